"""Finds the layers that a loss runs, by abstract traces.

A layer is known by its arrays where it gets the user's own.  Inside a transform it gets
others; then each dictionary of arrays in the parameters gets a *marker*, an array with
a number in its name, which the transform carries along.  A layer that finds a marker
beside its own arrays has their location in the user's tree.  Nothing is computed, but
for trees that are mapped from the parameters.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt._typing import Array, Params
from lbopt.curvature import arrivals, capture
from lbopt.curvature import locations as places
from lbopt.curvature.locations import Location
from lbopt.curvature.loss import eval_shape
from lbopt.curvature.observation import (
    Accepted,
    Observer,
    Sighting,
    Traced,
    matching,
    observe,
)


class Discovery(NamedTuple):
    """The layers of a loss, keyed by the index of their location.

    Attributes:
      sightings: the layers with a rule that run.
      routes: the way by which probes can reach each of them.
      refused: the reasons why layers with a rule have no tap.
      accepted: the trees mapped from the parameters that count as the parameters, by
        the order of the modules applied.
    """

    sightings: Mapping[int, Sighting]
    routes: Mapping[int, capture.Route]
    refused: Mapping[int, str]
    accepted: capture.Accepted


def discover(traced: Traced, used: Collection[tuple[Any, ...]]) -> Discovery:
    """Finds the layers with a rule that a loss runs, and the way to each of them.

    Args:
      traced: the loss.
      used: the key paths of the parameters that the loss depends on.

    Returns:
      The layers.

    Raises:
      ValueError: if a layer runs under a raw JAX transform; if the loss cannot bear
        other arrays in its parameters, although a layer needs them.
    """
    every = range(len(traced.locations))
    found = observe(traced)
    refused = dict(found.refused)
    accepted: Accepted = {}
    if found.arrivals.mapped:
        accepted, changed = _mapped(traced, found.arrivals.mapped)
        refused |= dict.fromkeys(changed, "its parameters are mapped by the loss")
        found = observe(traced, accepted=accepted)
    at_root: set[int] = set()
    in_params: set[int] = set()
    if found.inner_calls():
        at_root = set(every) - set(refused)
        found = observe(traced, at_root, accepted=accepted)
        in_params = matching(traced, found.inner_calls()) - set(refused)
    in_params |= _hidden(traced, found, used, refused, in_params)
    marked = None
    if in_params:
        marked = _with_markers(traced, found, at_root - in_params, in_params, accepted)
    if marked is not None:
        found, at_root = marked, at_root - in_params
    elif in_params:
        # What watches the trace keeps the last one, which failed.
        in_params = set()
        found = observe(traced, at_root, accepted=accepted)
    refused |= found.refused
    refused |= _derivatives(traced, found, at_root, in_params, accepted)
    routes: dict[int, capture.Route] = {}
    for number in found.sightings:
        if number in in_params:
            routes[number] = "params"
        else:
            routes[number] = "root" if number in found.lifted else "direct"
    trees = {
        order: {keys: traced.locations[i] for keys, i in numbers.items()}
        for order, numbers in accepted.items()
    }
    return Discovery(found.sightings, routes, refused, trees)


def _hidden(
    traced: Traced,
    found: Observer,
    used: Collection[tuple[Any, ...]],
    refused: Collection[int],
    known: Collection[int],
) -> set[int]:
    """The used locations that no layer was seen to read."""
    # A function that was compiled before is not traced again, and its layers are not
    # seen, unless its arguments have a new structure.
    return {
        number
        for number, location in enumerate(traced.locations)
        if not (number in found.sightings or number in refused or number in known)
        and any((*location.keys, name) in used for name in location.names)
    }


def _with_markers(
    traced: Traced,
    before: Observer,
    at_root: Collection[int],
    in_params: Collection[int],
    accepted: Accepted,
) -> Observer | None:
    """Traces the loss with markers in its parameters; None if it cannot bear them."""
    try:
        return observe(traced, at_root, in_params, accepted)
    except Exception as error:  # of any kind: it is the user's code that fails
        needed = matching(traced, before.inner_calls()) & set(in_params)
        if not needed:
            return None
        names = [traced.locations[i].path for i in sorted(needed)]
        raise ValueError(
            f"the parameters of {names} reach their layers through a transform of "
            "JAX's own (jax.jit, jax.checkpoint, jax.vmap, jax.lax.scan), so lbopt "
            f"adds arrays to params, and the loss fails with them: {error}. Use "
            "lbopt.plain(params) where the loss does anything but call the model with "
            "params, or let the transformed function take params from outside"
        ) from error


def _derivatives(
    traced: Traced,
    found: Observer,
    at_root: Collection[int],
    in_params: Collection[int],
    accepted: Accepted,
) -> dict[int, str]:
    """The layers through whose derivatives a gradient reaches the parameters."""
    reason = "the loss contains a derivative of it, which a tap cannot see"
    calls = [call for call in found.unknown if any(call.differentiated)]
    touched = found.differentiated | matching(traced, calls)
    if not touched:
        return {}
    try:
        derived = observe(traced, at_root, in_params, accepted, backward=True).derived
    except (NotImplementedError, TypeError):
        # Forward mode does not differentiate what watches the backward pass.
        derived = touched
    return dict.fromkeys(derived, reason)


def _mapped(
    traced: Traced, trees: Sequence[arrivals.Mapped]
) -> tuple[Accepted, set[int]]:
    """Tells trees whose derivative by the parameters is the identity.

    Args:
      traced: the loss.
      trees: the trees that modules were applied to, shaped like the parameters.

    Returns:
      Those with this derivative (a cast, a perturbation), and the numbers of the
      locations that others depend on.  A tree that does not depend on the parameters,
      such as a teacher's, is in neither.
    """
    leaves = jax.tree.leaves((traced.params, traced.args))
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        # Without values nothing can be told.
        return {}, {number for tree in trees for number in tree.numbers.values()}

    # Other numbers: a mask that is all ones at first may get zeros.
    args = jax.tree.map(
        lambda x: 1.5 * x + 0.25 if hasattr(x, "dtype") and _differentiable(x) else x,
        traced.args,
    )

    def arrived(params: Params) -> dict[int, Any]:
        found = arrivals.Arrivals(params, dict(enumerate(traced.locations)), {}, {})

        def interceptor(next_fun, args, kwargs, context):
            if context.module.scope is not None:
                found.enter(context.module)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            traced.loss(params, *args)
        return {tree.order: tree.tree for tree in found.mapped}

    _, pull_back = jax.vjp(arrived, traced.params)
    zeros = {tree.order: jax.tree.map(jnp.zeros_like, tree.tree) for tree in trees}
    accepted, changed = {}, set()
    for tree in trees:
        # Signs are exact in every type.  Those of each array differ: a map may exchange
        # or average arrays of one shape.
        leaves, structure = jax.tree.flatten(tree.tree)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        signs = jax.tree.unflatten(
            structure,
            [
                jax.random.rademacher(key, x.shape, x.dtype)
                for key, x in zip(keys, leaves, strict=True)
            ],
        )
        grads = pull_back(zeros | {tree.order: signs})[0]
        pairs = [
            (places.lookup(grads, at)[name], places.lookup(signs, here)[name])
            for keys, number in tree.numbers.items()
            for at in [traced.locations[number]]
            for here in [Location(keys, at.names)]
            for name in at.names
        ]
        if all(bool(jnp.all(g == sign)) for g, sign in pairs):
            accepted[tree.order] = tree.numbers
        elif any(bool(jnp.any(g != 0)) for g, _ in pairs):
            changed |= set(tree.numbers.values())
    return accepted, changed


def used_arrays(
    loss: Callable[..., Any], params: Params, args: Sequence[Any]
) -> set[tuple[Any, ...]]:
    """Finds the parameters that the loss depends on.

    Args:
      loss: the scalar loss.
      params: the parameters.
      args: the loss's other arguments.

    Returns:
      The key paths of the parameters that a gradient flows to.
    """
    # Each parameter passes through an identity whose backward rule records its path;
    # autodiff calls the rule only if a gradient reaches it.
    used: set[tuple[Any, ...]] = set()

    def note(path: tuple[Any, ...], x: Array) -> Array:
        @jax.custom_vjp
        def identity(x):
            return x

        def backward(_, g):
            used.add(path)
            return (g,)

        identity.defvjp(lambda x: (x, None), backward)
        return identity(x)

    def noted(params, args):
        return loss(
            jax.tree_util.tree_map_with_path(
                lambda path, x: note(keys_of(path), x) if _differentiable(x) else x,
                params,
            ),
            *args,
        )

    eval_shape(jax.grad(noted, allow_int=True), params, args)
    return used


def _differentiable(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def keys_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Converts a key path of JAX's tree functions to bare keys."""
    return tuple(getattr(entry, "key", getattr(entry, "idx", entry)) for entry in path)
