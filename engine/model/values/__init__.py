"""How the values of a model are kept."""
