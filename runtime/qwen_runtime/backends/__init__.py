"""The libraries that run a model, behind one protocol."""
