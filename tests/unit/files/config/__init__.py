"""Tests of the derived config.json."""
