"""Models and references for extracting adapters."""
