"""The output directory: lock, journal, group commit, digests, block cloning, publishing."""
