"""Image data sets: found, read, checked, decoded once, and augmented on the device."""
