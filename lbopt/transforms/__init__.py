"""Gradient transformations, one concept per file."""
