"""Large-batch training with curvature, as optax transformations."""

from lbopt import presets, schedules, sharding, training
from lbopt.curvature.fisher import likelihood, value_grad_and_curvature
from lbopt.curvature.refresh import refresh
from lbopt.curvature.registry import trace_layers
from lbopt.optimizers import kfac, lars, nlcg, sp_ngd
from lbopt.transforms.kfac import scale_by_kfac
from lbopt.transforms.lars import scale_by_lars
from lbopt.transforms.nlcg import scale_by_nlcg
from lbopt.transforms.norm_constraint import clip_by_kl
from lbopt.transforms.rescale import rescale_weights
from lbopt.transforms.reshard import reshard

__all__ = [
    "clip_by_kl",
    "kfac",
    "lars",
    "likelihood",
    "nlcg",
    "presets",
    "refresh",
    "rescale_weights",
    "reshard",
    "scale_by_kfac",
    "scale_by_lars",
    "scale_by_nlcg",
    "schedules",
    "sharding",
    "sp_ngd",
    "trace_layers",
    "training",
    "value_grad_and_curvature",
]
