"""The proof in the box: an artifact against the checkpoint that it was made from."""
