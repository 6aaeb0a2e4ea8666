"""Gradient transformations, one concept a file."""
