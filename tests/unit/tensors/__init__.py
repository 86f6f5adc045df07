"""Tests of stored tensors and tables of them."""
