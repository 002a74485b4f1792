"""What happened: interactions, catalog, sources, holdouts, partitions and prompts. Loads no torch."""
