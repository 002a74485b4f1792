"""What leaks at the cut, measured by attacks that are run, and what guards against it."""
