"""A checkpoint's tensors in whatever form: their names, what they can do, how they are put together."""
