"""Recipes of several stages."""
