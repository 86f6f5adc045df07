"""Tests of engine/model/adapters."""
