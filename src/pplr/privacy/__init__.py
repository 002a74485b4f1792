"""What leaks at the cut and in adapters, measured by attacks that are run, and what guards against it."""
