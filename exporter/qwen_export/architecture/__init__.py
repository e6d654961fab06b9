"""What a model is made of: its geometry, and every tensor with its name, shape and role."""
