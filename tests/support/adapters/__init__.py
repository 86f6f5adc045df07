"""Adapters for tests: those that PEFT writes, and small ones with chosen contents."""
