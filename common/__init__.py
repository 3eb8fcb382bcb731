"""Plumbing: files, flags, images, devices, fast attention, the optimizer. Read the method without it."""
