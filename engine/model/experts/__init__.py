"""Experts: how checkpoints store those of a mixture of experts, and how one layout is seen as the other."""
