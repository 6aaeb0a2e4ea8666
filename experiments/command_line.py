"""What every experiment's command line does: settings, runs, a picture, a last line."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import tyro

from experiments.classifier import draw, prepare, train
from experiments.settings import Config


def run(
    arguments: Sequence[str],
    description: str | None,
    configs: Mapping[str, Config],
    *,
    expand: Callable[[Config], list[Config]] = lambda config: [config],
) -> None:
    """Carries out what a command line asks for.

    Args:
        arguments: The command line without the program's name. The first argument may
            name one of `configs`; all others change its settings.
        description: What `--help` says first.
        configs: Settings by name; the first are the default.
        expand: The runs that the settings stand for, drawn in one picture.
    """
    named = arguments[0] if arguments and arguments[0] in configs else None
    default = configs[named or next(iter(configs))]
    try:
        config = tyro.cli(
            Config,
            args=arguments[named is not None :],
            description=description,
            default=default,
        )
        with contextlib.suppress(RuntimeError):  # too late: jax has its devices already
            jax.config.update("jax_num_cpu_devices", config.devices)
        prepared = [prepare(c) for c in expand(config)]
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    accuracies = {p.config.optimizer: train(p) for p in prepared}
    picture = prepared[0].directory / "curves.png"
    if len(prepared) > 1:
        picture = prepared[0].directory.parent / f"{'_and_'.join(accuracies)}.png"
        draw(prepared, picture)
    for optimizer, accuracy in accuracies.items():
        print(f"{optimizer:7} test accuracy {accuracy:.1%}")
    print(f"picture: {picture.resolve()}")
