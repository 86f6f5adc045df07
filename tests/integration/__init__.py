"""Merges from the recipe to the model directory, and the command line."""
