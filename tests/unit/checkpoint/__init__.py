"""Tests of checkpoints: their files, their index, and the identity of each file."""
