"""Methods that combine task vectors, the differences of the models from a base."""
