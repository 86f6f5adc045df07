"""The vocabulary of an output, and where the rows of its embeddings come from."""
