"""Published configurations and recipes, and pairs of models that must not cause an alarm."""
