"""What every part uses and no user calls: trees, placement on devices, files, layer types."""
