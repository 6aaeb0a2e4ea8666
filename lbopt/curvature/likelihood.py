"""The distribution of a model's outputs, as declared inside the loss."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from lbopt import checks
from lbopt._typing import Array, Scalar

Distribution: TypeAlias = Literal["categorical", "normal", "bernoulli"]


# A module, because an interceptor sees calls of modules and nothing else; with it, no
# global list of outputs is needed.
class Likelihood(nn.Module):
    """The identity, visible to interceptors."""

    distribution: str

    def __call__(
        self, outputs: Array, terms: Scalar | None, weights: Array | None
    ) -> Array:
        """Returns ``outputs``."""
        del terms, weights  # for interceptors
        return outputs


def likelihood(
    outputs: Array,
    distribution: Distribution,
    *,
    terms: Scalar | None = None,
    weights: Array | None = None,
) -> Array:
    r"""Declares that the loss is a negative log-likelihood of ``outputs``.

    An identity that a loss calls on the model's outputs, outside any transform:

    * ``categorical``: logits of a softmax over the last axis,
    * ``bernoulli``: logits of independent sigmoids,
    * ``normal``: means of a Gaussian of unit variance; the loss is
      :math:`\tfrac12 \lVert f - y \rVert^2`.

    The Fisher matrices ``"sampled"`` and ``"exact"`` and ``fisher_products`` need it;
    a loss whose terms cannot be found by ``trace_layers`` states them by it.

    Args:
      outputs: the distribution's parameters, ``[batch, ...]``.
      distribution: the distribution's name.
      terms: the number of terms that the loss averages, a number or, with ``weights``,
        a traced scalar; None if ``trace_layers`` is to find it, or for Σ w.
      weights: the terms' weights w, ``[batch]`` or ``[batch, ...]`` along the leading
        axes of ``outputs``, of a loss :math:`\sum_i w_i \ell_i / \sum_i w_i` (with
        another divisor n: ``terms=n``): a mask of booleans, or numbers that are not
        negative, of examples, classes, tokens or pixels.

    Returns:
      ``outputs``, unchanged.

    Raises:
      ValueError: for an unknown distribution, a number of terms below 1, traced terms
        without weights, or weights that do not fit the outputs.

    Examples:
      >>> import jax.numpy as jnp, lbopt
      >>> lbopt.likelihood(jnp.zeros((2, 3)), "categorical").shape
      (2, 3)
    """
    checks.one_of("distribution", distribution, get_args(Distribution))
    if weights is not None:
        shape = jnp.shape(weights)
        if not shape or shape != outputs.shape[: len(shape)]:
            raise ValueError(
                f"weights have shape {list(shape)}, but the outputs have "
                f"{list(outputs.shape)}; pass one weight per example, or one for each "
                "position along the leading axes of the outputs"
            )
    if isinstance(terms, jax.Array):
        if weights is None:
            raise ValueError(
                "terms is an array, so rows of the batch have weights (padding); pass "
                "weights= too, so that padding is left out of the inputs' statistics"
            )
    elif terms is not None:
        checks.whole("terms", terms, "None: trace_layers finds it")
    # parent=None: inside a module's method it would become a submodule of that module.
    return Likelihood(distribution, parent=None)(outputs, terms, weights)


class Outputs(NamedTuple):
    """The arguments of a call of ``likelihood``.

    Attributes:
      value: the model's outputs.
      distribution: the distribution's name.
      terms: the number of terms that the loss averages, or None.
      weights: the weights of its terms, or None.
    """

    value: Array
    distribution: str
    terms: Any
    weights: Any


def listen(outputs: list[Outputs]) -> Callable[..., Any]:
    """Returns an interceptor that appends the arguments of each ``likelihood`` call."""
    # An inner transform's tracer would leak if it were kept beyond that transform.
    trace = get_opaque_trace_state(convention="flax")

    def interceptor(next_fun, args, kwargs, context):
        if isinstance(context.module, Likelihood):
            module = context.module
            if get_opaque_trace_state(convention="flax") != trace:
                raise ValueError(
                    f"lbopt.likelihood(outputs, {module.distribution!r}) is called "
                    "inside a jit, vmap, scan or checkpoint inside the loss; call it "
                    "outside, once, on the outputs of the whole batch"
                )
            value, terms, weights = args
            outputs.append(Outputs(value, module.distribution, terms, weights))
        return next_fun(*args, **kwargs)

    return interceptor


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
