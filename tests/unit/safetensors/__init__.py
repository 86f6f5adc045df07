"""Tests of the safetensors format: headers, checkpoints, identities."""
