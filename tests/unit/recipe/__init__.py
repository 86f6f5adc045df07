"""Tests of engine/recipe."""
