"""Merges that are killed, starved and given damaged or unusual input, many times: correct bytes, or a refusal."""
