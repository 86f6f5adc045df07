"""Merges that are killed, starved and given damaged input, many times: the same bytes result, or a refusal."""
