"""Runs the passes of a kernel with torch, one operation at a time, on any device."""
