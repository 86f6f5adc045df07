"""Recipe + models -> task graph -> layout of the output files."""
