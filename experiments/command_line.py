"""The command line shared by the experiments: settings, runs, a picture, a summary."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import absl.logging
import jax
import tyro

from experiments import cluster, compilation_cache, loop, preemption
from experiments.settings import Config


def run(
    arguments: Sequence[str],
    description: str | None,
    configs: Mapping[str, Config],
    *,
    expand: Callable[[Config], list[Config]] = lambda config: [config],
) -> None:
    """Parses a command line and carries out its runs.

    Args:
      arguments: the command line without the program's name.  The first argument may
        name one of ``configs``; all others change its settings.
      description: the first paragraph of ``--help``.
      configs: settings by name; the first is the default.
      expand: turns the settings into several runs, drawn in one picture.

    Raises:
      SystemExit: with one of ``cluster.ExitCode``, unless all runs are done.
    """
    # A checkpoint that orbax cannot write is reported in our own words.
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        config = _parse(arguments, description, configs)
        cluster.start(
            config.distributed,
            start_timeout=config.start_timeout,
            heartbeat_timeout=config.heartbeat_timeout,
        )
        if config.devices > 1 and not jax.distributed.is_initialized():
            with contextlib.suppress(RuntimeError):  # too late: jax has its devices
                jax.config.update("jax_num_cpu_devices", config.devices)
        with cluster.fail_fast("start again with --resume"):
            expanded = expand(config)
            _require_read(arguments, expanded)
            if config.compilation_cache:
                compilation_cache.share_programs(_runs(config))
            stopped = _carry_out(expanded)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if stopped:
        print(f"{stopped}; start again with --resume", file=sys.stderr)
        sys.exit(cluster.ExitCode.PREEMPTED)


def _parse(
    arguments: Sequence[str], description: str | None, configs: Mapping[str, Config]
) -> Config:
    """Returns the settings that a command line asks for."""
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


def _require_read(arguments: Sequence[str], configs: Sequence[Config]) -> None:
    """Raises ValueError for a setting that none of the runs reads."""
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and all(c.ignores(name) for c in configs):
            optimizers = " and ".join(c.optimizer for c in configs)
            group = name.partition(".")[0]
            choice = f"pass --optimizer {group}" if "." in name else "choose another"
            raise ValueError(
                f"{argument} is not read by optimizer={optimizers}; leave it out, or "
                f"{choice}"
            )


def _runs(config: Config) -> pathlib.Path:
    """Returns the directory of the run's own directory."""
    return pathlib.Path("runs") if config.directory is None else config.directory.parent


def _carry_out(configs: Sequence[Config]) -> str | None:
    """Trains and draws; returns the reason if a run stopped before its end."""
    with preemption.Preemption() as preempted:
        prepared = [loop.prepare(config) for config in configs]
        if jax.process_index() == 0:
            print(cluster.describe())
            for run in prepared:
                if run.program.layers is not None:
                    print(run.program.layers)
        try:
            accuracies = {
                run.config.optimizer: loop.train(run, preempted) for run in prepared
            }
        except loop.InterruptedRunError as why:
            return str(why)
    if jax.process_index() == 0:
        _conclude(prepared, accuracies)
    return None


def _conclude(prepared: Sequence[loop.Run], accuracies: Mapping[str, float]) -> None:
    """Prints accuracies and reports, and draws the runs together."""
    for optimizer, accuracy in accuracies.items():
        print(f"{optimizer:7} test accuracy {accuracy:.1%}")
    for run in prepared:
        print(f"report: {(run.directory / 'report.md').resolve()}")
    if len(prepared) > 1:
        picture = prepared[0].directory.parent / f"{'_and_'.join(accuracies)}.png"
        loop.draw(prepared, picture)
        print(f"picture: {picture.resolve()}")
