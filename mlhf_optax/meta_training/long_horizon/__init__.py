"""Meta-training over whole trainings by evolution strategies."""
