"""What it takes to gather the rows of a matrix, such as the embeddings of tokens."""
