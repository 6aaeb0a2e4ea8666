"""Large-batch training with curvature, as optax transformations."""

from lbopt import health, memory_plan, presets, schedules, sharding, training
from lbopt.background import BackgroundInversion
from lbopt.curvature.fisher import curvature_only, value_grad_and_curvature
from lbopt.curvature.fisher_products import fisher_products
from lbopt.curvature.likelihood import likelihood
from lbopt.curvature.locations import plain
from lbopt.curvature.refresh import Due, inverse_age, refresh
from lbopt.curvature.registry import trace_layers
from lbopt.health import layer_factors, layer_report
from lbopt.optimizers.kfac import distributed_kfac, kfac
from lbopt.optimizers.lars import lars
from lbopt.optimizers.nlcg import nlcg
from lbopt.optimizers.sp_ngd import sp_ngd
from lbopt.settings import Periods, Placement
from lbopt.transforms.average import average_params, averaged_params
from lbopt.transforms.kfac import scale_by_kfac
from lbopt.transforms.kfac_state import curvature_state
from lbopt.transforms.lars import scale_by_lars
from lbopt.transforms.nlcg import scale_by_nlcg
from lbopt.transforms.norm_constraint import clip_by_kl
from lbopt.transforms.quadratic_model import scale_by_quadratic_model
from lbopt.transforms.rescale import rescale_weights
from lbopt.transforms.reshard import reshard

__all__ = [
    "BackgroundInversion",
    "Due",
    "Periods",
    "Placement",
    "average_params",
    "averaged_params",
    "clip_by_kl",
    "curvature_only",
    "curvature_state",
    "distributed_kfac",
    "fisher_products",
    "health",
    "inverse_age",
    "kfac",
    "lars",
    "layer_factors",
    "layer_report",
    "likelihood",
    "memory_plan",
    "nlcg",
    "plain",
    "presets",
    "refresh",
    "rescale_weights",
    "reshard",
    "scale_by_kfac",
    "scale_by_lars",
    "scale_by_nlcg",
    "scale_by_quadratic_model",
    "schedules",
    "sharding",
    "sp_ngd",
    "trace_layers",
    "training",
    "value_grad_and_curvature",
]
