"""The head of a loss: what it does with the outputs of the model.

The outputs are the arrays that the outermost modules return, or the argument of
``likelihood`` if the loss calls it.  Replaced by arrays of any size, they make the loss
a function of its outputs that costs nothing of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from lbopt._typing import Array
from lbopt.curvature.derivatives import on_cotangent
from lbopt.curvature.lanes import note_lanes
from lbopt.curvature.likelihood import Likelihood
from lbopt.curvature.loss import eval_shape

Name: TypeAlias = tuple[int, int]
"""An output: the order of the outermost call, and the leaf of what it returned.

The arguments of ``likelihood`` have the order −1 and are numbered by their calls."""
LIKELIHOOD = -1


class Head(NamedTuple):
    """What one trace saw of a loss's outputs.

    Attributes:
      structures: the trees that the outermost calls returned, as shapes.
      outputs: the shapes of the outputs that reach the loss's own code, by name.
      inner: for those inside a transform of the loss, the sizes of its ``vmap`` axes.
      stated: the calls of ``likelihood`` that state ``"terms"`` or ``"weights"``.
    """

    structures: list[Any]
    outputs: dict[Name, jax.ShapeDtypeStruct]
    inner: dict[Name, list[int]]
    stated: dict[str, list[Name]]


class Outermost:
    """An interceptor for the outermost calls of modules, and for ``likelihood``."""

    def __init__(self, treat: Callable[[int, tuple, Callable[[], Any]], Any]) -> None:
        """Makes an interceptor.

        Args:
          treat: ``(order, args, call) -> `` what the loss gets; ``call`` runs the
            method.
        """
        self._treat, self._depth, self._order = treat, 0, 0

    def __call__(
        self, next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any
    ) -> Any:
        """Calls a method of a module, for ``nn.intercept_methods``."""
        if isinstance(context.module, Likelihood):
            return self._treat(LIKELIHOOD, args, lambda: next_fun(*args, **kwargs))
        # Setup returns nothing, and nothing that it calls is an output.
        if self._depth or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        order = self._order
        self._order += 1
        self._depth += 1
        try:
            return self._treat(order, args, lambda: next_fun(*args, **kwargs))
        finally:
            self._depth -= 1


def observe(
    loss: Callable[..., Array],
) -> tuple[Callable[..., Array], Head]:
    """Prepares to see the outputs of a loss in an abstract trace.

    Args:
      loss: the scalar loss.

    Returns:
      The loss to trace, and what the last trace of it saw.
    """
    head = Head([], {}, {}, {})
    calls: list[int] = [0]
    trace: list[Any] = [None]

    def traced(*args: Any) -> Array:
        trace[0], calls[0] = get_opaque_trace_state(convention="flax"), 0
        for seen in head:  # of an earlier trace of the same loss
            seen.clear()
        with nn.intercept_methods(Outermost(treat)):
            return loss(*args)

    def treat(order: int, args: tuple, call: Callable[[], Any]) -> Any:
        inner = get_opaque_trace_state(convention="flax") != trace[0]
        outputs = call()
        leaves = jax.tree.leaves(outputs)
        if order == LIKELIHOOD:
            names = [(LIKELIHOOD, calls[0])]
            calls[0] += 1
            for what, x in zip(("terms", "weights"), args[1:], strict=True):
                if x is not None:
                    head.stated.setdefault(what, []).extend(names)
        else:
            head.structures.append(jax.tree.map(_shape, outputs))
            names = [(order, i) for i in range(len(leaves))]
        for name, leaf in zip(names, leaves, strict=True):
            if hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating):
                head.outputs[name] = _shape(leaf)
                if inner:
                    lanes = head.inner.setdefault(name, [])
                    note_lanes(leaf, jnp.zeros([]), lanes)
        return outputs

    return traced, head


def replaced(
    head: Head, outputs: Mapping[Name, Array], loss: Callable[..., Array]
) -> Callable[..., Array]:
    """Returns the loss with its outputs replaced, without running the model.

    Outputs inside a transform of the loss are not replaced: JAX keeps what it compiles
    or traces there, and would use it again.

    Args:
      head: what an abstract trace saw.
      outputs: arrays in place of the outputs, of any size.
      loss: the scalar loss.

    Returns:
      ``loss``.
    """

    def run(*args: Any) -> Array:
        calls = [0]

        def treat(order: int, args: tuple, call: Callable[[], Any]) -> Any:
            del args
            if order == LIKELIHOOD:
                call()
                calls[0] += 1
                return outputs[(LIKELIHOOD, calls[0] - 1)]
            # A compiled function that was traced before is not seen again.
            unseen = order >= len(head.structures)
            if unseen or any(name[0] == order for name in head.inner):
                return call()
            leaves, tree = jax.tree.flatten(head.structures[order])
            return jax.tree.unflatten(
                tree, [outputs.get((order, i), x) for i, x in enumerate(leaves)]
            )

        with nn.intercept_methods(Outermost(treat)):
            return loss(*args)

    return run


def others_reach(
    head: Head, loss: Callable[..., Array], params: Any, args: Sequence[Any]
) -> bool:
    """Whether outputs reach a loss past its calls of ``likelihood``.

    Args:
      head: what an abstract trace saw.
      loss: the scalar loss.
      params: its parameters, arrays or shapes.
      args: its other arguments, arrays or shapes.

    Returns:
      Whether any does.
    """
    names = [n for n in head.outputs if n[0] != LIKELIHOOD and n not in head.inner]
    reached: list[int] = []

    def of_outputs(outputs: dict[Name, Array], params: Any, args: Any) -> Array:
        watched = {n: on_cotangent(outputs[n], reached.append) for n in names}
        return replaced(head, outputs | watched, loss)(params, *args)

    eval_shape(jax.grad(of_outputs), head.outputs, params, tuple(args))
    return bool(reached)


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
