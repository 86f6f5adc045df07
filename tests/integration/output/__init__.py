"""The output directory, end to end: sharing, saved stages, verification, versions."""
