"""Task graph + budget -> steps: order, chunks, cache. Pure functions without torch or file access."""
