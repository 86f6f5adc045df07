"""What merge methods are built from: the kernel contract, tiles, sums, selection, hashing."""
