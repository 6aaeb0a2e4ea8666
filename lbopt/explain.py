"""What an optimizer with curvature would do to a model, before anything is trained.

This command ::

    python -m lbopt.explain my_package.models:Net --input 256x32x32x3 --devices 8

prints which layer gets which curvature block and why, what each device would keep in
memory, and which device would invert what. ``Net`` is a Flax (linen) module, or a class
or function that makes one, with literal arguments if it needs some:
``'my_package.models:Net(width=64)'``; ``--input`` is an array that the model is
called with, the whole batch of all devices. The model is traced, and nothing computed:
the devices need not be there.
"""

import argparse
import ast
import functools
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt import memory_plan, sharding, training
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
      inputs: what it is called with, arrays or their shapes; the batch of all devices
        along the first axis.
      arguments: keyword arguments of the call, such as ``{"train": True}``.
      devices: how many devices share batch and curvature.
      placement: where inverses live, as in ``lbopt.Placement``.
      block_size: likewise.
      inverse_period: steps from one inversion to the next, staggered.

    Returns:
      The text.

    Raises:
      ValueError: if the model cannot be called with the inputs, or the devices cannot
        share the batch.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from lbopt import explain
      >>> model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(10)])
      >>> x = jax.ShapeDtypeStruct((128, 20), jnp.float32)
      >>> layers, memory, owners = explain.report(model, [x]).split("\n\n")
      >>> print(memory.splitlines()[0])
      1,994 parameters; memory per device: parameters 7.98 kB, ...
    """
    _check_batch(inputs, devices)
    layers, params, model_state = _traced(model, inputs, dict(arguments or {}))
    spread = Placement()
    if devices > 1:
        spread = Placement("data", devices, placement)
    tx = kfac(
        0.1,
        layers,
        block_size=block_size,
        periods=Periods(inverses=inverse_period, stagger=inverse_period > 1),
        placement=spread,
    )
    state = jax.eval_shape(
        functools.partial(training.init_state, tx), params, model_state, _KEY
    )
    owners = sharding.owner_table(
        layers,
        devices,
        block_size=block_size,
        inverse_period=inverse_period,
        placement=placement,
    )
    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return "\n\n".join(
        [
            repr(layers),
            f"{numbers:,} parameters; {memory_plan.plan(state, inputs, devices)}\n"
            "(K-FAC with momentum; gradients and activations come on top, as XLA "
            "counts them once it has compiled your step)",
            repr(owners),
        ]
    )


_KEY = jax.eval_shape(lambda: jax.random.key(0))


def _traced(
    model: nn.Module, inputs: Sequence[Any], arguments: dict[str, Any]
) -> tuple[Layers, Any, dict[str, Any]]:
    """The layers of a model, and the shapes of its parameters and other collections."""
    init = functools.partial(model.init, **arguments)
    try:
        variables = dict(jax.eval_shape(init, _KEY, *inputs))
    except Exception as error:  # whatever the user's model raises
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in inputs)
        raise ValueError(
            f"model={type(model).__name__} cannot be called with {shapes}"
            f"{f' and {arguments}' if arguments else ''}: {error}. Give each array of "
            "the call as --input, and other arguments as --set NAME=VALUE"
        ) from error
    params = variables.pop("params", {})

    def loss_fn(params: Any, model_state: Any, rng: Any, *inputs: Any) -> Any:
        outputs, _ = model.apply(
            {"params": params, **model_state},
            *inputs,
            rngs={"params": rng, "dropout": rng},
            mutable=list(model_state),
            **arguments,
        )
        # Any loss that depends on all outputs has the same layers.
        means = [
            jnp.mean(x, dtype=jnp.float32)
            for x in jax.tree.leaves(outputs)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return sum(means, jnp.float32(0))

    layers = trace_layers(
        loss_fn, params, variables, _KEY, *inputs, batch_size=inputs[0].shape[0]
    )
    return layers, params, variables


def _check_batch(inputs: Sequence[Any], devices: int) -> None:
    if not inputs or not all(x.shape for x in inputs):
        raise ValueError(
            f"inputs={list(inputs)} must be at least one array with a batch axis"
        )
    if devices < 1:
        raise ValueError(f"devices={devices} must be at least 1")
    if batch := inputs[0].shape[0] % devices:
        raise ValueError(
            f"devices={devices} cannot share a batch of {inputs[0].shape[0]}: "
            f"{batch} examples are left over; choose a multiple"
        )


def _model(text: str) -> nn.Module:
    """The model that `MODULE:ATTR`, or `MODULE:ATTR(ARGUMENTS)`, names."""
    module, _, attribute = text.partition(":")
    try:
        name, positional, named = _call(attribute)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"model={text!r} must be MODULE:ATTR, as my_package.models:Net or, with "
            "literals, 'my_package.models:Net(width=64)'"
        ) from None
    try:
        found = functools.reduce(
            getattr, name.split("."), importlib.import_module(module)
        )
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model={text!r} cannot be had: {error}") from error
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found(*positional, **named)
        except TypeError as error:
            raise ValueError(
                f"model={text!r} cannot be made: {error}. Give arguments as in "
                "'my_package.models:Net(width=64)', or name an instance"
            ) from error
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"model={text!r} is a {type(found).__name__}, not a Flax (linen) module"
        )
    return found


def _call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """A dotted name, and the literals it is called with if it is."""
    node = ast.parse(text, mode="eval").body
    positional, named = [], {}
    if isinstance(node, ast.Call):
        positional = [ast.literal_eval(argument) for argument in node.args]
        named = {k.arg or "**": ast.literal_eval(k.value) for k in node.keywords}
        node = node.func
    name = ast.unparse(node)
    if not all(part.isidentifier() for part in (*name.split("."), *named)):
        raise ValueError
    return name, positional, named


def _input(text: str) -> jax.ShapeDtypeStruct:
    """An array from text such as `256x32x32x3` or `256x128:int32`."""
    shape, _, dtype = text.partition(":")
    try:
        sizes = tuple(int(size) for size in shape.split("x"))
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype or "float32"))
    except (ValueError, TypeError):
        raise ValueError(
            f"input={text!r} must be sizes and perhaps a type, as 256x32x32x3 or "
            "256x128:int32"
        ) from None


def _argument(text: str) -> tuple[str, Any]:
    """A keyword argument from text such as `train=True`."""
    name, equals, value = text.partition("=")
    try:
        if not (name.isidentifier() and equals):
            raise ValueError
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(
            f"set={text!r} must be NAME=VALUE with a Python literal, as train=True"
        ) from None


def _placement(text: str) -> float | str:
    """A placement: a name, or a share."""
    try:
        return float(text)
    except ValueError:
        return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what `report` says.

    Args:
      arguments: of the command line; None for the process's own.

    Raises:
      SystemExit: if something of it is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lbopt.explain",
        description="Prints a Flax model's curvature blocks, memory and owners.",
    )
    parser.add_argument(
        "model", metavar="MODULE:ATTR", help="the model, or what makes it"
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE",
        help="an array of the call: 256x32x32x3, 256x128:int32; once for each",
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
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(text)


if __name__ == "__main__":
    main()
