"""Steps -> bytes: lanes, cache, arena, compute."""
