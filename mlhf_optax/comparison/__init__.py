"""Running trainings and meta-trainings, comparing optimizers, and showing what came out."""
