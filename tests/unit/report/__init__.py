"""Tests of mergeloom/report."""
