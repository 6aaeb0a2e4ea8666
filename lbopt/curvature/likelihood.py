"""The distribution of a model's outputs, as declared inside the loss."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
from jax.extend.core import get_opaque_trace_state

from lbopt import checks
from lbopt._typing import Array
from lbopt.curvature import discovery

Distribution: TypeAlias = Literal["categorical", "normal", "bernoulli"]


# A module, because an interceptor sees calls of modules and nothing else; with it, no
# global list of outputs is needed.
class _Likelihood(nn.Module):
    """The identity, visible to interceptors."""

    distribution: str
    terms: int | None

    def __call__(self, outputs: Array) -> Array:
        return outputs


def likelihood(
    outputs: Array, distribution: Distribution, *, terms: int | None = None
) -> Array:
    r"""Declares that the loss is a negative log-likelihood of ``outputs``.

    An identity that a loss calls on the model's outputs, outside any transform:

    * ``categorical``: logits of a softmax over the last axis,
    * ``bernoulli``: logits of independent sigmoids,
    * ``normal``: means of a Gaussian of unit variance; the loss is
      :math:`\tfrac12 \lVert f - y \rVert^2`.

    Only ``fisher="sampled"``, ``fisher="exact"`` and ``fisher_products`` need it.

    Args:
      outputs: the distribution's parameters, ``[batch, ...]``.
      distribution: the distribution's name.
      terms: number of terms that the loss averages, if not the batch size (for example
        batch × tokens).

    Returns:
      ``outputs``, unchanged.

    Raises:
      ValueError: for an unknown distribution or a number of terms below 1.

    Examples:
      >>> import jax.numpy as jnp, lbopt
      >>> lbopt.likelihood(jnp.zeros((2, 3)), "categorical").shape
      (2, 3)
    """
    checks.one_of("distribution", distribution, get_args(Distribution))
    if terms is not None:
        checks.whole("terms", terms, "None stands for the batch size")
    # parent=None: inside a module's method it would become a submodule of that module.
    return _Likelihood(distribution, terms, parent=None)(outputs)


class Outputs(NamedTuple):
    """The arguments of a call of ``likelihood``.

    Attributes:
      value: the model's outputs.
      distribution: the distribution's name.
      terms: number of terms that the loss averages, or None.
    """

    value: Array
    distribution: str
    terms: int | None


def listen(outputs: list[Outputs]) -> Callable[..., Any]:
    """Returns an interceptor that appends the arguments of each ``likelihood`` call."""
    # An inner transform's tracer would leak if it were kept beyond that transform.
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
    """Returns the number of terms that the loss averages.

    Args:
      outputs: the arguments of the calls of ``likelihood``.
      batch_size: the number stated to lbopt, or None.
      args: the loss's arguments after the parameters.

    Returns:
      The stated number, or else the batch size.

    Raises:
      ValueError: if different numbers are stated, or none and no argument is a batch.
    """
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
            "size); state it by batch_size= or by likelihood(..., terms=)"
        )
    return n


def single_outputs(
    outputs: Sequence[Outputs], loss_name: str, needed_by: str
) -> Outputs:
    """Returns the arguments of the only call of ``likelihood``.

    Args:
      outputs: the arguments of all calls.
      loss_name: the loss function's name, for the message.
      needed_by: the function or option that needs the outputs, for the message.

    Returns:
      The arguments.

    Raises:
      ValueError: unless there was exactly one call.
    """
    if len(outputs) != 1:
        raise ValueError(
            f"{needed_by} needs lbopt.likelihood(outputs, ...) called once, but "
            f"loss_fn={loss_name} calls it {len(outputs)} times; call it on the "
            "model's outputs, outside any jit, vmap, scan or checkpoint inside the loss"
        )
    return outputs[0]
