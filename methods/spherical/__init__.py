"""Methods based on angles between tensors, or between rows or columns of them."""
