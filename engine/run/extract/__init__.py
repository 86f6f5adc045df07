"""Extracts a LoRA adapter from a model and its base, one matrix at a time."""
