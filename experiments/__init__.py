"""Experiments with `lbopt`: data, models, runs and what they report."""
