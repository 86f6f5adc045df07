"""Tests of engine/files."""
