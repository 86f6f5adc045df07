"""The devices that compute, and the function that opens those of a schedule."""
