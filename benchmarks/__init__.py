"""Measurements of lbopt beside plain SGD and beside its peers."""

import os

# Before anything loads LAPACK: its own threads fight with XLA's, which makes the
# inversions of every library here several times slower and erratic.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
