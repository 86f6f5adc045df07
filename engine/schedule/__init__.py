"""Schedules a graph within a budget: order, chunks, cache. Pure functions without torch or file access."""
