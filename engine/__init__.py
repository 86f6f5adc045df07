"""Recipe -> graph -> schedule -> execution. Knows no file format and prints nothing."""
