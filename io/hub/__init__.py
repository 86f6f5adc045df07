"""Models on the Hugging Face Hub: metadata, byte ranges, downloads."""
