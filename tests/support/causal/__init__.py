"""Every causal language model class of transformers at tiny size, and what merges of two such models must do."""
