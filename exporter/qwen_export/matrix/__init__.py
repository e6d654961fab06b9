"""A release: which checkpoints are exported for which profiles, what has changed, and the work of it."""
