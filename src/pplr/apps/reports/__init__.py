"""Pages that a person reads after a run: one HTML file, which needs nothing else to be looked at."""
