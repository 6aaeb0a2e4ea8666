"""Measurements of lbopt beside plain SGD and beside its peers."""
