"""Stored tensors: their dtypes, where they are, and tables of them."""
