"""Tests of io/."""
