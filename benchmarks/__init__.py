"""Side-by-side measurements, each one command; every ratio is of medians taken in turns within one run."""
