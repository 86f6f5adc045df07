"""The config.json of an output: comparison of the inputs, rearranged layers, and keys that follow the tensors."""
