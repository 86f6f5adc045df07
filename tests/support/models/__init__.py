"""Models to merge: shapes, values, checkpoint files."""
