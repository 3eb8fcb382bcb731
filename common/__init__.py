"""Plumbing: files, flags, images, devices, the fast attention path, the optimizer. The method can be read
without it."""
