"""Large-batch training with curvature, as optax transformations."""

from lbopt import training
from lbopt.curvature.fisher import likelihood, value_grad_and_curvature
from lbopt.curvature.refresh import refresh
from lbopt.curvature.registry import trace_layers
from lbopt.optimizers import kfac
from lbopt.transforms.kfac import scale_by_kfac
from lbopt.transforms.norm_constraint import clip_by_kl

__all__ = [
    "clip_by_kl",
    "kfac",
    "likelihood",
    "refresh",
    "scale_by_kfac",
    "trace_layers",
    "training",
    "value_grad_and_curvature",
]
