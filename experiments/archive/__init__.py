"""Finished studies; README.md says at which commit each of them ran."""
