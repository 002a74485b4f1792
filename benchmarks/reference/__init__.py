"""The usual ways, written out, to measure against."""
