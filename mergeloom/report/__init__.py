"""The reports: everything that is printed or drawn."""
