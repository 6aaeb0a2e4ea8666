"""What a loss says of its outputs' distribution, and how others hear it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
from jax.extend.core import get_opaque_trace_state

from lbopt._typing import Array
from lbopt.curvature import discovery

Distribution: TypeAlias = Literal["categorical", "normal", "bernoulli"]

_DISTRIBUTIONS = ("categorical", "normal", "bernoulli")


class _Likelihood(nn.Module):
    """Carries the model's outputs past the interceptor."""

    distribution: str
    terms: int | None

    def __call__(self, outputs: Array) -> Array:
        return outputs


def likelihood(
    outputs: Array, distribution: Distribution, *, terms: int | None = None
) -> Array:
    r"""States that the loss is a negative log-likelihood of ``outputs``.

    An identity, called by a loss on the model's outputs, outside any transform:

    * ``categorical``: logits of a softmax over the last axis,
    * ``bernoulli``: logits of independent sigmoids,
    * ``normal``: means of a Gaussian of unit variance; the loss is
      :math:`\tfrac12 \lVert f - y \rVert^2`.

    Needed for ``fisher="sampled"`` and ``"exact"`` only.

    Args:
      outputs: what the distribution is parametrised by, ``[batch, ...]``.
      distribution: its name.
      terms: how many terms the loss averages, if not the batch size (for example
        batch × tokens).

    Returns:
      ``outputs``.

    Raises:
      ValueError: for an unknown distribution.

    Examples:
      >>> import jax.numpy as jnp, lbopt
      >>> lbopt.likelihood(jnp.zeros((2, 3)), "categorical").shape
      (2, 3)
    """
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(
            f"distribution={distribution!r} must be one of {_DISTRIBUTIONS}"
        )
    return _Likelihood(distribution, terms, parent=None)(outputs)


class Outputs(NamedTuple):
    """What a call of ``likelihood`` passed.

    Attributes:
      value: the model's outputs.
      distribution: the distribution's name.
      terms: how many terms the loss averages, where it was stated.
    """

    value: Array
    distribution: str
    terms: int | None


def listen(outputs: list[Outputs]) -> Callable[..., Any]:
    """An interceptor that notes what ``likelihood`` is called on, in order."""
    trace = get_opaque_trace_state(convention="flax")

    def interceptor(next_fun, args, kwargs, context):
        if isinstance(context.module, _Likelihood):
            module = context.module
            if get_opaque_trace_state(convention="flax") != trace:
                raise ValueError(
                    f"lbopt.likelihood(outputs, {module.distribution!r}) is called "
                    "inside a jit, vmap, scan or checkpoint inside the loss; call it "
                    "outside, once, on the outputs of the whole batch"
                )
            outputs.append(Outputs(args[0], module.distribution, module.terms))
        return next_fun(*args, **kwargs)

    return interceptor


def count_terms(
    outputs: Sequence[Outputs], batch_size: int | None, args: Sequence[Any]
) -> int:
    """How many terms the loss averages."""
    stated = {o.terms for o in outputs if o.terms is not None}
    if batch_size is not None:
        stated.add(batch_size)
    if len(stated) > 1:
        raise ValueError(
            f"the loss's number of terms is stated as {sorted(stated)}; state it once, "
            "by batch_size= or by likelihood(..., terms=)"
        )
    n = next(iter(stated), None) or discovery.infer_batch_size(args)
    if n is None:
        raise ValueError(
            "no argument of the loss looks like a batch (arrays that share a leading "
            "size); state it by batch_size="
        )
    return n


def single_outputs(
    outputs: Sequence[Outputs], loss_name: str, needed_by: str
) -> Outputs:
    """What the one call of ``likelihood`` passed.

    Args:
      outputs: all that was noted.
      loss_name: the loss function's name, for the message.
      needed_by: what needs the outputs, likewise.

    Returns:
      The outputs.

    Raises:
      ValueError: if it was not called once.
    """
    if len(outputs) != 1:
        raise ValueError(
            f"{needed_by} needs lbopt.likelihood(outputs, ...) called once, but "
            f"loss_fn={loss_name} calls it {len(outputs)} times; call it on the "
            "model's outputs, outside any jit, vmap, scan or checkpoint inside the loss"
        )
    return outputs[0]
