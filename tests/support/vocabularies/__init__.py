"""Small models with real tokenizers of several kinds, and the rows that a merge of them must have."""
