"""Published recipes: small models of the families that they name, and what each recipe makes of them."""
