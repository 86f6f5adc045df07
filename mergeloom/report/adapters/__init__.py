"""Reports about adapters."""
