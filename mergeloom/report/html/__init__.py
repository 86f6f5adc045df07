"""The dry run as an HTML page."""
