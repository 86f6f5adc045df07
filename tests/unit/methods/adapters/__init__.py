"""Tests of the arithmetic of adapters: factors, products and the decoders of adapted values."""
