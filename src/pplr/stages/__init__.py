"""The model, cut: stages, the boundary between them, and the transport that crosses it."""
