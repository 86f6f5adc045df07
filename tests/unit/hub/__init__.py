"""Tests of io/hub."""
