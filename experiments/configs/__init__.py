"""Runs with published settings, built from `lbopt.presets`; a file for each model."""
