"""Tests of engine/execute."""
