"""Models on the Hugging Face Hub: file listings, headers by range request, resumable downloads."""
