"""The model, whole."""
