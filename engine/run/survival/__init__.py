"""Reports how much of the changes of a merge survives when its output is rounded."""
