"""Names of tensors: those that a recipe gives to a model, and those of a part of another model."""
