"""The task graph as plain data: for other tools, and to recognize an unfinished merge."""
