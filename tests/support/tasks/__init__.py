"""Random task graphs: tasks that use tasks, parts behind accesses, and what each of them must write."""
