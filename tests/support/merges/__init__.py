"""Small merges for tests: interrupted, finished, and into OUT in every state."""
