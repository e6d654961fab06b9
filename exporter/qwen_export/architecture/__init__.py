"""What the config of a model says: its geometry, and every tensor that a checkpoint of it must hold."""
