"""What leaks, and what guards: secret randomness, what a run's ε is, what may not be combined with it, and audits."""
