"""The output directory: lock, journal, group commit, digests, clones, publication."""
