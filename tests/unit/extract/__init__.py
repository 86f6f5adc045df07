"""Tests of extracting adapters, part by part."""
