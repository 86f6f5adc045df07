"""Adapters, from models to files that PEFT loads."""
