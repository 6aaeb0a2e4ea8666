"""The optimizers and their search spaces: two settings each, drawn alike for all.

The same number of settings of each optimizer is tried at every batch size: points that
fill the square of the logarithms of the step size, over two decades, and of one more
setting. First-order runs warm up linearly and keep their rate. Every run is judged by
an average of its iterates, so that each of its readings is worth as much as the last.

K-FAC's step size is the bound in KL divergence of Ba et al., or is found by the
quadratic model. K-FAC takes its statistics from labels drawn from the model, SP-NGD
from the labels of the data, as in their papers. Both invert at every step: the study
counts steps, and the layers are small. Variants of K-FAC with one or two settings
changed, searched and repeated as all others at the largest batch sizes, show which of
these choices matter.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax

import lbopt
from experiments.large_batch.problems import Problem

WARM_UP = 5
"""Steps until a first-order rate is reached."""
AVERAGE = 0.95
"""Decay of the average of the iterates; smaller in the first steps."""
LARGEST_RATE = 1.0
"""K-FAC's rate, which its bound shortens."""
LARS_ON_KFAC_RATE = 0.1
"""Rate of arrays whose trust ratio is larger, such as biases that are zero. A natural
gradient has a length of its own: with the rates of plain LARS, of the order of 10,
biases and norm layers would diverge (tried: test errors on images stay above 0.8)."""

Range = tuple[float, float]
Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An optimizer and its search space.

    Attributes:
        title: Its name in tables and pictures.
        make: `(size, other, layers, problem) -> optimizer`, where the step size is a
            schedule and the second setting a number; both may be traced.
        other: Name of the second setting; `None` for none.
        step_sizes: Smallest and largest by problem; `None` if the optimizer finds it.
        others: Smallest and largest second setting.
        fisher: As for `make_train_step`; `None` for an optimizer without curvature.
        warm_up: Steps until the step size is reached.
        step_size: Name of the step size.
    """

    title: str
    make: Make
    other: str | None
    step_sizes: Mapping[str, Range] | None
    others: Mapping[str, Range] | None
    fisher: Literal["empirical", "sampled"] | None = None
    warm_up: int = WARM_UP
    step_size: str = "rate"

    @property
    def curvature(self) -> bool:
        """Whether the optimizer needs curvature."""
        return self.fisher is not None

    def optimizer(
        self, settings: Mapping[str, Any], layers: Any, problem: Problem
    ) -> optax.GradientTransformation:
        """Builds the optimizer with warm-up and average of the iterates."""
        size = settings["step_size"]

        def schedule(count: Any) -> Any:
            return size * jnp.minimum(1.0, (count + 1) / self.warm_up)

        tx = self.make(schedule, settings["other"], layers, problem)
        return optax.chain(tx, lbopt.average_params(AVERAGE, warm_up=True))

    def draw(self, problem: Problem, number: int) -> list[dict[str, float]]:
        """Returns settings to try, as `{"step_size", "other"}`; 1 if it has none."""
        sizes, others = (
            (1.0, 1.0) if ranges is None else ranges[problem.name]
            for ranges in (self.step_sizes, self.others)
        )
        return [
            {"step_size": _between(u, sizes), "other": _between(v, others)}
            for u, v in _points(number)
        ]


def _points(number: int) -> list[tuple[float, float]]:
    """Returns a lattice that fills the unit square; Fibonacci's for 8 points."""
    return [
        ((i + 0.5) / number, (5 * i % number + 0.5) / number) for i in range(number)
    ]


def _between(u: float, ends: Range) -> float:
    low, high = ends
    return float(f"{low * (high / low) ** u:.3g}")


# === The optimizers ===================================================================


def _sgd(size: Any, other: Any, _layers: Any, _problem: Problem):
    return optax.sgd(size, momentum=1 - other, nesterov=True)


def _adamw(size: Any, other: Any, _layers: Any, _problem: Problem):
    return optax.adamw(size, weight_decay=other)


def _lamb(size: Any, other: Any, _layers: Any, _problem: Problem):
    return optax.lamb(size, weight_decay=other)


def _lars(size: Any, other: Any, _layers: Any, _problem: Problem):
    return lbopt.lars(size, momentum=1 - other, weight_decay=1e-5, variant="mlperf")


def _muon(size: Any, other: Any, _layers: Any, _problem: Problem):
    def dimensions(params: Any) -> Any:
        """Kernels are matrices of (locations and inputs) × outputs."""

        def one(x: Any) -> Any:
            if getattr(x, "ndim", 0) < 2:  # optax leaves marks where it looks not
                return None
            inputs = tuple(range(x.ndim - 1))
            return optax.contrib.MuonDimensionNumbers(inputs, (x.ndim - 1,))

        return _each_array(one, params)

    return optax.contrib.muon(
        size, beta=1 - other, muon_weight_dimension_numbers=dimensions
    )


def _each_array(function: Callable[[Any], Any], tree: Any) -> Any:
    """Maps the arrays of nested dictionaries; what the function returns are leaves."""
    if isinstance(tree, Mapping):
        return {key: _each_array(function, child) for key, child in tree.items()}
    return function(tree)


def _nlcg(size: Any, _other: Any, _layers: Any, _problem: Problem):
    return lbopt.nlcg(size)


def _kfac(size: Any, other: Any, layers: Any, _problem: Problem, **changes: Any):
    settings = {"damping": other, "momentum": 0.9, "factor_decay": 0.95} | changes
    return lbopt.kfac(LARGEST_RATE, layers, kl_clip=size, **settings)


def _kfac_quadratic(_size: Any, other: Any, layers: Any, _problem: Problem):
    return lbopt.scale_by_quadratic_model(lbopt.scale_by_kfac(layers), damping=other)


def _sp_ngd(size: Any, other: Any, layers: Any, problem: Problem):
    rescale: Any = "always" if problem.sharing_norms else None
    return lbopt.sp_ngd(
        size, layers, damping=other, momentum=0.9, kl_clip=None, rescale=rescale
    )


def _lars_on_kfac(size: Any, other: Any, layers: Any, _problem: Problem):
    coefficient = size(0)  # it takes a number, and does not warm up
    lars = lbopt.lars(
        LARS_ON_KFAC_RATE,
        weight_decay=0.0,
        trust_coefficient=coefficient,
        variant="paper",
        clip=True,
    )
    return optax.chain(lbopt.scale_by_kfac(layers, damping=other), lars)


def _ranges(strokes: Range, digits: Range) -> dict[str, Range]:
    return {"strokes": strokes, "digits": digits}


def _same(ends: Range) -> dict[str, Range]:
    return _ranges(ends, ends)


_FRICTION = _same((0.02, 0.3))
_DAMPING = _ranges((1e-4, 1e-1), (1e-2, 1e1))

CONTESTANTS = {
    "sgd": Contestant(
        "SGD, Nesterov",
        _sgd,
        "1 - momentum",
        _ranges((0.05, 5.0), (0.003, 0.3)),
        _FRICTION,
    ),
    "adamw": Contestant(
        "AdamW",
        _adamw,
        "weight decay",
        _ranges((3e-3, 3e-1), (1e-3, 1e-1)),
        _same((1e-4, 1e-1)),
    ),
    "lars": Contestant("LARS", _lars, "1 - momentum", _same((1.0, 100.0)), _FRICTION),
    "lamb": Contestant(
        "LAMB", _lamb, "weight decay", _same((2e-3, 2e-1)), _same((1e-4, 1e-1))
    ),
    "muon": Contestant(
        "Muon",
        _muon,
        "1 - momentum",
        _ranges((5e-3, 5e-1), (2e-3, 2e-1)),
        _FRICTION,
    ),
    "nlcg": Contestant("NLCG", _nlcg, None, _ranges((0.05, 5.0), (0.003, 0.3)), None),
    "kfac": Contestant(
        "K-FAC",
        _kfac,
        "damping",
        _ranges((0.01, 1.0), (0.003, 0.3)),
        _ranges((1e-4, 1e-1), (1e-3, 1e0)),
        fisher="sampled",
        warm_up=1,  # early steps are long in KL, and bounded
        step_size="bound in KL",
    ),
    "kfac_quadratic": Contestant(
        "K-FAC, quadratic model",
        _kfac_quadratic,
        "first damping",
        None,
        _ranges((1e-2, 1e1), (1e-4, 1e-1)),
        fisher="sampled",
    ),
    "sp_ngd": Contestant(
        "SP-NGD",
        _sp_ngd,
        "damping",
        _ranges((0.003, 0.3), (0.01, 1.0)),
        _DAMPING,
        fisher="empirical",
        warm_up=1,  # its momentum goes with the rate over the first one
    ),
    "lars_on_kfac": Contestant(
        "LARS on K-FAC",
        _lars_on_kfac,
        "damping",
        _same((1e-3, 1e-1)),
        _DAMPING,
        fisher="sampled",
        warm_up=1,  # the trust ratio bounds early steps
        step_size="trust coefficient",
    ),
}
"""The contestants by name; the first ones use gradients alone."""


def _variant(title: str, fisher: Any = "sampled", **changes: Any) -> Contestant:
    """Returns K-FAC with other settings or labels."""
    make = functools.partial(_kfac, **changes)
    return dataclasses.replace(
        CONTESTANTS["kfac"], title=title, make=make, fisher=fisher
    )


VARIANTS = {
    "kfac_stale_inverses": _variant(
        "inverses at every fifth step", periods=lbopt.Periods(inverses=5)
    ),
    "kfac_stale_statistics": _variant(
        "statistics and inverses at every fifth step", periods=lbopt.Periods(5, 5)
    ),
    "kfac_one_batch": _variant("statistics of one batch alone", factor_decay=0.0),
    "kfac_data_labels": _variant("labels of the data", fisher="empirical"),
    "kfac_no_momentum": _variant("no momentum", momentum=None),
    "kfac_short_memory": _variant(
        "momentum 0.7, factors' average 0.8", momentum=0.7, factor_decay=0.8
    ),
}
"""K-FAC with one setting changed, and last with two that the first ones suggest."""

EVERYONE = CONTESTANTS | VARIANTS
"""All optimizers that a cell may have."""
