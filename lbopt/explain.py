"""A report, before any training, of how K-FAC would treat a model.

This command ::

    python -m lbopt.explain my_package.models:Net --input 256x32x32x3 --devices 8

prints the layers as ``print(lbopt.trace_layers(...))`` does, but for the terms of a
loss, the memory that each device would need, and the inversions that it would own.
``Net`` is a Flax (linen) module, or a class or function that returns one, with literal
arguments if it needs any: ``'my_package.models:Net(width=64)'``.  ``--input`` is the
shape of an array that the model is called with, for the batch of all devices.  The
model is only traced: nothing is computed, and the devices need not exist.
"""

import argparse
import ast
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt import checks, memory_plan, sharding, training
from lbopt.curvature.registry import Layers, trace_layers
from lbopt.optimizers.kfac import kfac
from lbopt.settings import Periods, Placement


def report(
    model: nn.Module,
    inputs: Sequence[jax.ShapeDtypeStruct],
    *,
    arguments: Mapping[str, Any] | None = None,
    devices: int = 1,
    placement: float | int | str = "comm",
    block_size: int | None = None,
    inverse_period: int = 1,
) -> str:
    r"""The layer table, the memory plan and the owner table of a model under K-FAC.

    Args:
      model: the model.
      inputs: the arrays that it is called with, or their shapes; the batch of all
        devices along the first axis.
      arguments: keyword arguments of the call, such as ``{"train": True}``.
      devices: number of devices that share batch and curvature.
      placement: where inverses live, as in ``lbopt.Placement``.
      block_size: as for ``scale_by_kfac``.
      inverse_period: steps from one inversion to the next, staggered over the units.

    Returns:
      The text.

    Raises:
      ValueError: if the model cannot be called with the inputs, or the batch cannot be
        divided evenly among the devices.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from lbopt import explain
      >>> model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(10)])
      >>> x = jax.ShapeDtypeStruct((128, 20), jnp.float32)
      >>> layers, memory, owners = explain.report(model, [x]).split("\n\n")
      >>> print(memory.splitlines()[0])
      1,994 parameters; memory per device: parameters 7.98 kB, ...
    """
    _check_batch(inputs, devices)  # first, or the failure would be the model's
    layers, params, model_state = _traced(model, inputs, dict(arguments or {}))
    owners = sharding.owner_table(
        layers,
        devices,
        block_size=block_size,
        inverse_period=inverse_period,
        placement=placement,
    )
    spread = Placement()
    if devices > 1:
        spread = Placement("data", devices, placement)
    tx = kfac(
        0.1,  # any rate: only the shapes of the state matter
        layers,
        block_size=block_size,
        periods=Periods(inverses=inverse_period, stagger=inverse_period > 1),
        placement=spread,
    )
    state = jax.eval_shape(
        functools.partial(training.init_state, tx), params, model_state, _KEY
    )
    numbers = sum(x.size for x in jax.tree.leaves(params))
    return "\n\n".join(
        [
            repr(layers),
            f"{numbers:,} parameters; {memory_plan.plan(state, inputs, devices)}\n"
            "(K-FAC with momentum; gradients and activations come on top: XLA counts "
            "them when it compiles your step)",
            repr(owners),
        ]
    )


# A shape: making a key at import would start the backend.
_KEY = jax.eval_shape(lambda: jax.random.key(0))


def _traced(
    model: nn.Module, inputs: Sequence[Any], arguments: dict[str, Any]
) -> tuple[Layers, Any, dict[str, Any]]:
    """A model's layers, and the shapes of its parameters and other collections."""
    order: dict[str, Any] = {}

    def init(*args: Any) -> Any:
        made = model.init(*args, **arguments)
        order.update(_keys(made))  # JAX returns dictionaries with sorted keys
        return made

    try:
        variables = _in_order(jax.eval_shape(init, _KEY, *inputs), order)
    except Exception as error:  # of any kind: it is the user's model that is called
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in inputs)
        raise ValueError(
            f"model={type(model).__name__} cannot be called with {shapes}"
            f"{f' and {arguments}' if arguments else ''}: {error}. Pass each array of "
            "the call as --input, and other arguments as --set NAME=VALUE"
        ) from error
    params = variables.pop("params", {})

    def loss_fn(params: Any, model_state: Any, rng: Any, *inputs: Any) -> Any:
        outputs, _ = model.apply(
            {"params": params, **model_state},
            *inputs,
            rngs={"params": rng, "dropout": rng},
            mutable=list(model_state),  # normalisation updates its averages in training
            **arguments,
        )
        # Stands in for the user's loss: any loss of all outputs has the same layers.
        means = [
            jnp.mean(x, dtype=jnp.float32)
            for x in jax.tree.leaves(outputs)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return sum(means, jnp.float32(0))  # a scalar even if no output is a float

    batch = inputs[0].shape[0]
    layers = trace_layers(loss_fn, params, variables, _KEY, *inputs, batch_size=batch)
    terms = layers.terms._replace(text="those of your loss, which trace_layers finds")
    return Layers(layers, terms, layers.accepted), params, variables


def _keys(tree: Any) -> dict[str, Any]:
    """The keys of nested dictionaries, in their order."""
    return {
        key: _keys(value) if isinstance(value, Mapping) else None
        for key, value in tree.items()
    }


def _in_order(tree: Any, order: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries in the order of others with the same keys."""
    return {
        key: tree[key] if below is None else _in_order(tree[key], below)
        for key, below in order.items()
    }


def _check_batch(inputs: Sequence[Any], devices: int) -> None:
    if not inputs or not all(x.shape for x in inputs):
        raise ValueError(
            f"inputs={list(inputs)} must be at least one array with a batch axis"
        )
    checks.whole("devices", devices, "1 is a run without a mesh")
    batch = inputs[0].shape[0]
    if batch % devices:
        raise ValueError(
            f"devices={devices} must divide the batch of {batch} examples; choose a "
            "multiple"
        )


def _model(text: str) -> nn.Module:
    """Imports the model named `MODULE:ATTR` or `MODULE:ATTR(ARGUMENTS)`."""
    module, _, attribute = text.partition(":")
    try:
        name, positional, named = _call(attribute)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"model={text!r} must be MODULE:ATTR, such as my_package.models:Net or, "
            "with literals, 'my_package.models:Net(width=64)'"
        ) from None  # the parser's error says nothing about the argument
    try:
        found = functools.reduce(
            getattr, name.split("."), importlib.import_module(module)
        )
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model={text!r} cannot be imported: {error}") from error
    # An instance is callable too, but calling it would be a forward pass.
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found(*positional, **named)
        except TypeError as error:
            raise ValueError(
                f"model={text!r} cannot be made: {error}. Pass arguments as in "
                "'my_package.models:Net(width=64)', or name an instance"
            ) from error
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"model={text!r} must be a Flax (linen) module, not a "
            f"{type(found).__name__}"
        )
    return found


def _call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Parses a dotted name and the literal arguments of its call, if it is called."""
    # Literals only: a command line must not run code of its own.
    node = ast.parse(text, mode="eval").body
    positional, named = [], {}
    if isinstance(node, ast.Call):
        positional = [ast.literal_eval(argument) for argument in node.args]
        # An unpacked mapping has no name; "**" is no identifier and refused below.
        named = {k.arg or "**": ast.literal_eval(k.value) for k in node.keywords}
        node = node.func
    name = ast.unparse(node)
    if not all(part.isidentifier() for part in (*name.split("."), *named)):
        raise ValueError
    return name, positional, named


def _input(text: str) -> jax.ShapeDtypeStruct:
    """Parses an array's shape, such as `256x32x32x3` or `256x128:int32`."""
    shape, _, dtype = text.partition(":")
    try:
        sizes = tuple(int(size) for size in shape.split("x"))
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype or "float32"))
    except (ValueError, TypeError):
        raise ValueError(
            f"input={text!r} must be sizes and, optionally, a type, such as "
            "256x32x32x3 or 256x128:int32"
        ) from None


def _argument(text: str) -> tuple[str, Any]:
    """Parses a keyword argument, such as `train=True`."""
    name, equals, value = text.partition("=")
    try:
        if not (name.isidentifier() and equals):
            raise ValueError
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(
            f"set={text!r} must be NAME=VALUE with a Python literal, such as train=True"
        ) from None


def _placement(text: str) -> float | str:
    """Parses a placement: a share, or else a name."""
    try:
        return float(text)
    except ValueError:
        return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report of a model named on the command line.

    Args:
      arguments: the command line's arguments; None for the process's own.

    Raises:
      SystemExit: if an argument is invalid.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lbopt.explain",
        description="Prints a Flax model's curvature blocks, memory and owners.",
    )
    parser.add_argument(
        "model", metavar="MODULE:ATTR", help="a model, or a function that makes one"
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE",
        help="an array of the call: 256x32x32x3, 256x128:int32; repeat for each",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of the call: train=True",
    )
    parser.add_argument("--devices", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--placement", default="comm", help="comm, memory, or a share: default comm"
    )
    parser.add_argument("--block-size", type=int, help="as for lbopt.scale_by_kfac")
    parser.add_argument("--inverse-period", type=int, default=1, help="default: 1")
    options = parser.parse_args(arguments)
    try:
        text = report(
            _model(options.model),
            [_input(text) for text in options.input],
            arguments=dict(map(_argument, options.set)),
            devices=options.devices,
            placement=_placement(options.placement),
            block_size=options.block_size,
            inverse_period=options.inverse_period,
        )
    except ValueError as error:  # an argument's: one line, without a traceback
        raise SystemExit(f"error: {error}") from error
    print(text)


if __name__ == "__main__":
    main()
