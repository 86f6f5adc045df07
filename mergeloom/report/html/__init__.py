"""The dry run as one HTML page."""
