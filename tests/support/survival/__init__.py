"""What rounding keeps of a change, computed from files, and models to measure it on."""
