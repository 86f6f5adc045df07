"""Vocabularies: the tokens of models, the output's, and the rows of embeddings that belong to them."""
