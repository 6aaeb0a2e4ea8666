"""Tap rules: the block that a layer gets, and the residual that its tap saves.

A rule applies to one method of one Flax class.  The rules of Flax's own layers are in
``curvature.flax_layers``; users pass rules of their own to ``trace_layers``.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from lbopt._typing import Array
from lbopt.curvature import block, kronecker, unit_wise

Arguments = Mapping[str, Any]


class Seen(NamedTuple):
    """One call of a layer.

    Attributes:
      module: the bound Flax module.
      arguments: the call's arguments by name.
      params: the layer's own parameters, without lifted axes.
    """

    module: Any
    arguments: Arguments
    params: Mapping[str, Array]


class Choice(NamedTuple):
    """The user's choice among the approximations that suit a layer.

    Attributes:
      sharing: how locations that share a kernel are treated.
      norm_blocks: the kind of a normalisation layer's block.
      feature_map: locations and channels of the feature map that a dense layer's input
        is flattened from, for a doubly factored block; None for a Kronecker block.
    """

    sharing: kronecker.WeightSharing
    norm_blocks: unit_wise.NormBlocks
    feature_map: tuple[int, int] | None


class Rule(NamedTuple):
    """The rule by which one method of one Flax class is tapped.

    Attributes:
      block: ``(seen, batched, choice) -> block``; raises ``Refusal`` with the reason if
        the theory does not hold.
      residual: ``seen -> arrays`` that the backward pass needs.
      names: names of the parameters that the block covers.
    """

    block: Callable[[Seen, bool, Choice], block.CurvatureBlock]
    residual: Callable[[Seen], Any]
    names: tuple[str, ...] = ("kernel", "bias")


class Refusal(Exception):  # noqa: N818  (no "Error": it is caught, the layer falls back)
    """The reason why a layer with a rule falls back to diagonal blocks."""


Rules: TypeAlias = Mapping[Callable[..., Any], Rule]


def own_rules(rules: Mapping[Any, Any]) -> Rules:
    """Keys a user's rules by the functions behind the methods.

    Args:
      rules: the rules by method.

    Returns:
      The rules by unwrapped function.

    Raises:
      ValueError: for a key that is not a method or a value that is not a ``Rule``.
    """
    for method, rule in rules.items():
        name = getattr(method, "__qualname__", repr(method))
        if not inspect.isfunction(method):
            raise ValueError(
                f"rules[{name}]: the key must be a method, {name}.__call__ for example"
            )
        if not isinstance(rule, Rule):
            raise ValueError(
                f"rules[{name}]={rule!r} is a {type(rule).__name__}; it must be a "
                "tap_rules.Rule(block, residual, names)"
            )
    # Flax wraps the methods of a class; the interceptor sees the function inside.
    return {inspect.unwrap(method): rule for method, rule in rules.items()}


def bind_arguments(method: Any, args: tuple, kwargs: Mapping[str, Any]) -> Arguments:
    """Returns a call's arguments by name, defaults included."""
    # Positional or by keyword, a rule reads every argument by its name.
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
