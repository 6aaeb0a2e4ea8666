"""A user's loss function, its keywords, and the batch among its arguments."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter
from typing import Any

import jax
import jax.numpy as jnp

from lbopt._typing import Array

CALL_KEYWORDS: tuple[str, ...] = ("rng", "due", "loss_scale")
"""The keywords that the functions that evaluate curvature keep for themselves."""


def without_aux(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Returns the scalar loss function behind a jitted loss or one with aux."""
    loss_fn = unjitted(loss_fn)

    def loss(*args: Any, **kwargs: Any) -> Array:
        return split_aux(loss_fn(*args, **kwargs), has_aux, loss_fn)[0]

    return loss


def unjitted(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function inside ``jax.jit``, or ``loss_fn`` itself."""
    # likelihood cannot hand outputs out of an inner jit.
    while isinstance(loss_fn, jax.stages.Wrapped):
        # inspect.unwrap would also remove other decorators, which belong to the loss.
        loss_fn = vars(loss_fn)["__wrapped__"]
    return loss_fn


def split_aux(
    result: Any, has_aux: bool, loss_fn: Callable[..., Any]
) -> tuple[Array, Any]:
    """Checks a loss function's result and returns it as ``(loss, aux)``.

    Args:
      result: the loss, or ``(loss, aux)``.
      has_aux: whether it is ``(loss, aux)``.
      loss_fn: the function, for the message.

    Returns:
      The loss as an array, and aux or None.

    Raises:
      ValueError: if the result has another form or the loss is not one real number.
    """
    # As in jax.value_and_grad, but said before autodiff fails on it.
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    if has_aux is not is_pair:
        kind = "a pair" if is_pair else f"a {type(result).__name__}"
        raise ValueError(
            f"loss_fn={name_of(loss_fn)} returns {kind}, but has_aux={has_aux}; "
            "return (loss, aux) with has_aux=True, the loss alone otherwise"
        )
    pair: Any = result if has_aux else (result, None)
    loss, aux = pair
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            f"loss_fn={name_of(loss_fn)} returns "
            f"{jnp.result_type(loss)}{list(jnp.shape(loss))}; the loss is one real "
            "number, a mean over the batch"
        )
    return jnp.asarray(loss), aux


def name_of(function: Callable[..., Any]) -> str:
    """Returns a function's name for messages; of a callable object that of its type."""
    # The repr of a partial, or of a bound method, contains the whole model.
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def refuse_shared_keywords(
    loss_fn: Callable[..., Any],
    args: Sequence[Any],
    kept: Mapping[str, Any],
    *,
    idle: Collection[str] = (),
) -> None:
    """Raises ValueError for a keyword that lbopt keeps and the loss would take, too.

    In Python's terms such a keyword is the loss's, which would run without it.  It is
    harmless if its value is None, or the default that the loss has for it, and if the
    loss gets the parameter from its positional arguments.

    Args:
      loss_fn: the loss.
      args: its positional arguments after the parameters.
      kept: the values of the keywords that lbopt keeps.
      idle: those that lbopt makes no use of, so that a loss with ``**kwargs`` is meant.

    Raises:
      ValueError: naming the keyword, the loss and the way out.
    """
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):  # some callables have none
        return
    ordered = [
        p.name
        for p in parameters
        if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    bound = ordered[: 1 + len(args)]  # the first is the parameters'
    for p in parameters:
        named = p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        names = [p.name] if named and p.name not in bound else []
        if p.kind is Parameter.VAR_KEYWORD:
            names = [name for name in idle if name not in bound]
        for name in names:
            value = kept.get(name)
            if value is None or (named and _same(value, p.default)):
                continue
            plain = isinstance(value, (bool, int, float, str))
            shown = repr(value) if plain else type(value).__name__
            first = ""
            if p.kind is Parameter.POSITIONAL_OR_KEYWORD:
                first = "pass it as one of the loss's positional arguments, or "
            raise ValueError(
                f"{name}={shown} is an argument of lbopt's own, and would not reach "
                f"that of loss_fn={name_of(loss_fn)}; {first}write a loss that calls "
                f"{name_of(loss_fn)} with {name}="
            )


def _same(value: Any, default: Any) -> bool:
    # Comparing arrays has no single answer.
    if isinstance(value, (bool, int, float, str)):
        return type(value) is type(default) and value == default
    return value is default


def with_keywords(
    loss: Callable[..., Array], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Array], Sequence[Any]]:
    """Returns a loss of positional arguments alone, and these arguments.

    Args:
      loss: the loss of the parameters and other arguments.
      args: its positional arguments after the parameters.
      kwargs: its keyword arguments.

    Returns:
      A loss whose last argument is the dictionary of keyword arguments, if there are
      any, and its arguments.
    """
    if not kwargs:
        return loss, args

    def positional(params: Any, *args: Any) -> Array:
        return loss(params, *args[:-1], **args[-1])

    return positional, (*args, dict(kwargs))


def infer_batch_size(args: Sequence[Any]) -> int | None:
    """Infers the batch size from the loss's arguments.

    An argument counts as a batch if it contains arrays and all of them have the same
    leading size.  PRNG keys, scalars and nested mappings (a model's collections, such
    as ``batch_stats``) do not count.

    Args:
      args: the loss's arguments after the parameters.

    Returns:
      The leading size, or None if no argument looks like a batch.

    Raises:
      ValueError: if two arguments look like batches of different sizes.
    """
    sizes: dict[int, int] = {}
    for position, arg in enumerate(args):
        leading = {
            leaf.shape[0] for leaf in jax.tree.leaves(arg) if _is_batch_array(leaf)
        }
        if len(leading) == 1 and not _is_collection(arg):
            sizes[position] = leading.pop()
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"argument {i + 1}: {n}" for i, n in sizes.items())
        raise ValueError(
            f"cannot tell the batch among the loss's arguments (leading sizes {listed})"
            "; pass batch_size="
        )
    return next(iter(sizes.values()), None)


def is_empty(args: Sequence[Any]) -> bool:
    """Whether the arrays of one of a loss's arguments all hold no examples."""
    sizes = [
        {leaf.shape[0] for leaf in jax.tree.leaves(arg) if _is_batch_array(leaf)}
        for arg in args
    ]
    return {0} in sizes


def _is_collection(arg: Any) -> bool:
    return isinstance(arg, Mapping) and any(
        isinstance(child, Mapping) for child in arg.values()
    )


def _is_batch_array(leaf: Any) -> bool:
    if not getattr(leaf, "shape", ()):
        return False
    # jax.random.PRNGKey returns a bare array, without a dtype of its own.
    raw_key = leaf.dtype == jnp.uint32 and leaf.shape == (2,)
    return not raw_key and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def eval_shape(function: Callable[..., Any], *operands: Any) -> None:
    """Calls ``jax.eval_shape``, passing arguments that are not arrays unchanged."""
    leaves, tree = jax.tree.flatten(operands)

    def call(arrays: list[Any]) -> Any:
        found = iter(arrays)
        merged = [next(found) if hasattr(x, "shape") else x for x in leaves]
        return function(*jax.tree.unflatten(tree, merged))

    jax.eval_shape(call, [x for x in leaves if hasattr(x, "shape")])
