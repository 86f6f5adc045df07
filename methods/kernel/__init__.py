"""The building blocks of merge methods: kernel interface, tiles, block sums, selection, random masks."""
