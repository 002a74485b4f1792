"""The web page of a run: a recommendation and what crossed the cut for it, and a training that is under way."""
