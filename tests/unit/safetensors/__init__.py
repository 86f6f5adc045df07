"""Tests of the safetensors format: headers."""
