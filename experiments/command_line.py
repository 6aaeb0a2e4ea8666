"""What every experiment's command line does: settings, runs, a picture, a last line."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence

import absl.logging
import jax
import tyro

from experiments import cluster, loop, preemption
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

    Raises:
        SystemExit: With one of `cluster.ExitCode`, unless all went well.
    """
    # What orbax cannot write is told in our own words.
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        config = _parse(arguments, description, configs)
        joined = cluster.start(
            config.distributed,
            start_timeout=config.start_timeout,
            heartbeat_timeout=config.heartbeat_timeout,
        )
        if joined.processes == 1 and config.devices > 1:
            with contextlib.suppress(RuntimeError):  # too late: jax has its devices
                jax.config.update("jax_num_cpu_devices", config.devices)
        with cluster.others_may_die(joined, "start again with --resume") as reached:
            stopped = _carry_out(joined, expand(config), reached)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if stopped:
        print(f"{stopped}; start again with --resume", file=sys.stderr)
        sys.exit(cluster.ExitCode.PREEMPTED)


def _parse(
    arguments: Sequence[str], description: str | None, configs: Mapping[str, Config]
) -> Config:
    """The settings that a command line asks for."""
    named = arguments[0] if arguments and arguments[0] in configs else None
    if arguments and named is None and not arguments[0].startswith("-"):
        raise ValueError(
            f"{arguments[0]!r} names no settings; there are {', '.join(configs)}"
        )
    return tyro.cli(
        Config,
        args=arguments[named is not None :],
        description=description,
        default=configs[named or next(iter(configs))],
    )


def _carry_out(
    joined: cluster.Cluster, configs: Sequence[Config], reached: Callable[[int], None]
) -> str | None:
    """Trains and draws; returns what stopped it before the end, if anything did."""
    with preemption.Preemption() as preempted:
        prepared = [loop.prepare(config) for config in configs]
        if joined.is_first():
            print(joined.describe())
            for run in prepared:
                if run.program.layers is not None:
                    print(run.program.layers)
        try:
            accuracies = {
                run.config.optimizer: loop.train(run, preempted, reached)
                for run in prepared
            }
        except loop.InterruptedRunError as why:
            return str(why)
    if joined.is_first():
        _conclude(prepared, accuracies)
    return None


def _conclude(prepared: Sequence[loop.Run], accuracies: Mapping[str, float]) -> None:
    """Draws the runs together and says how they ended."""
    for optimizer, accuracy in accuracies.items():
        print(f"{optimizer:7} test accuracy {accuracy:.1%}")
    for run in prepared:
        print(f"report: {(run.directory / 'report.md').resolve()}")
    if len(prepared) > 1:
        picture = prepared[0].directory.parent / f"{'_and_'.join(accuracies)}.png"
        loop.draw(prepared, picture)
        print(f"picture: {picture.resolve()}")
