"""Compares the values of two models, tensor by tensor."""
