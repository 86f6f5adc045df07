"""What a checkpoint contains besides layers of a language model: diffusion models, adapters; and what to call it."""
