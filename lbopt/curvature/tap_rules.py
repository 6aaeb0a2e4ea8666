"""What a rule is: which block a layer gets, and what its tap saves.

A rule stands for one method of one Flax class.  Those for Flax's own layers are in
``curvature.flax_layers``; a user's are given to ``trace_layers``.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from lbopt._typing import Array
from lbopt.curvature import block, kronecker, unit_wise

Arguments = Mapping[str, Any]


class Seen(NamedTuple):
    """One call of a layer, as its rule sees it.

    Attributes:
      module: the bound Flax module.
      arguments: the call's arguments by name.
      params: the layer's own parameters, one copy of them.
    """

    module: Any
    arguments: Arguments
    params: Mapping[str, Array]


class Choice(NamedTuple):
    """Which of the approximations that suit a layer it gets.

    Attributes:
      sharing: how locations that share a kernel are treated.
      norm_blocks: what a normalisation layer's block holds.
      feature_map: locations and channels of the map that a dense layer's input is
        flattened from, where it gets a factor for each; None where it gets one factor.
    """

    sharing: kronecker.WeightSharing
    norm_blocks: unit_wise.NormBlocks
    feature_map: tuple[int, int] | None


class Rule(NamedTuple):
    """How one method of one Flax class is tapped.

    Attributes:
      block: ``(seen, batched, choice) -> block``; raises ``Refusal`` with the reason
        where the theory does not hold.
      residual: ``seen -> arrays`` that the backward rule needs.
      names: the names of the parameters that the block covers.
    """

    block: Callable[[Seen, bool, Choice], block.CurvatureBlock]
    residual: Callable[[Seen], Any]
    names: tuple[str, ...] = ("kernel", "bias")


class Refusal(Exception):  # noqa: N818  (a verdict that falls back, not an error)
    """Why a layer that is otherwise known gets no block of its own."""


Rules: TypeAlias = Mapping[Callable[..., Any], Rule]


def own_rules(rules: Mapping[Any, Any]) -> Rules:
    """A user's rules by the functions as they stand in the classes, not as Flax wraps.

    Args:
      rules: the rules by method.

    Returns:
      The rules by function.

    Raises:
      ValueError: if one is none, or is not given for a method.
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
    return {inspect.unwrap(method): rule for method, rule in rules.items()}


def bind_arguments(method: Any, args: tuple, kwargs: Mapping[str, Any]) -> Arguments:
    """The call's arguments by the names of the method's signature."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
