"""Attributes of reads, nodes and outputs in flat arrays: a list of objects takes several times as much memory."""
