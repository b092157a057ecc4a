"""Meta-training on short unrolls, as in the paper (section 3.1)."""
