"""Learned optimizers of the literature, on the same harness; imported only by name."""
