"""Models with adapters, end to end."""
