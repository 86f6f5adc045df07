"""Plans and merges at the true shapes of large models."""
