"""PyTorch checkpoint files, as ``torch.save`` writes them: where their tensors lie, read without running anything."""
