"""The machine's memory and speed, and time estimates."""
