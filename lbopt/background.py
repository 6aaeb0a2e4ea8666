"""Inversion in the background: another process inverts while the devices train."""

import contextlib
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import numpy as np

from lbopt import checks, inversion_worker, sharding
from lbopt.collectives import Axis
from lbopt.curvature import layer_table
from lbopt.curvature.registry import Layer, Layers
from lbopt.inversion_worker import Job
from lbopt.transforms import outside, unit_classes
from lbopt.transforms.kfac_state import (
    KfacState,
    curvature_state,
    is_curvature_state,
    plain,
)
from lbopt.transforms.reshard import owners_in

T = TypeVar("T")

# Failures in a row after which no new process is started.
_PATIENCE = 3


class BackgroundInversion:
    """Renews an optimizer's inverses in another process, so that training never waits.

    Call it between steps with the training state: it sends the latest factors to the
    process whenever that is idle, and puts the inverses into the state as soon as they
    have arrived.  ``lbopt.inverse_age`` tells how old the inverses in effect are.

    The state is complete at all times: it may be saved between any two steps, and only
    the inversion in progress is lost.  If inversion fails or the process dies, a
    warning is issued, training continues with the last good inverses, and a new process
    tries again, at most three times in a row.

    Args:
      layers: the result of ``trace_layers``.
      block_size: the ``block_size`` of the optimizer.
      delay: steps after which inverses take effect: those of the factors of step t at
        step t + delay, as with ``Periods.delay``.  Inverses that have not arrived by
        then are waited for, so that a run's numbers do not depend on its speed.  None
        for as soon as possible.
      cores: CPU cores on which the process may run; None for all.

    Raises:
      ValueError: for settings out of range, and, when called, for a state without
        exactly one curvature transform, or one that is spread over several hosts.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> tx = lbopt.scale_by_kfac(layers, periods=lbopt.Periods(inverses=None))
      >>> f = lbopt.value_grad_and_curvature(loss_fn, layers)
      >>> state = tx.init(params)
      >>> with lbopt.BackgroundInversion(layers, delay=2) as exchange:
      ...     for _ in range(4):
      ...         _, grads, curvature = f(params, x)
      ...         _, state = tx.update(grads, state, curvature=curvature)
      ...         state = exchange(state)
      >>> int(lbopt.inverse_age(state)["layers_0"].a)  # of step 2; the last is 3
      1

    Source: Ba, Grosse & Martens 2017, §3.  Of the authors' two implementations one
    inverts block after block (tensorflow/kfac), the other everything with a queue of
    one (baselines), as here.  Their first steps are without curvature; here the step
    itself computes the first inverses.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        block_size: int | None = None,
        delay: int | None = None,
        cores: Sequence[int] | None = None,
    ) -> None:
        if delay is not None:
            checks.whole("delay", delay, "None delivers inverses as soon as possible")
        if cores is not None:
            _check_cores(cores)
        self._known = layer_table.configured(
            layers.preconditioned, block_size=block_size
        )
        self._delay, self._cores = delay, cores
        self._folder = tempfile.TemporaryDirectory(prefix="lbopt-")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lbopt-background")
        self._process: subprocess.Popen[bytes] | None = None
        self._under_way: Future[Any] | None = None
        self._calls = self._sent = self._failures = 0
        self._closed = False
        self._take_out = jax.jit(
            lambda state: outside.export_factors(self._layers(state), state)
        )
        self._bring_in = jax.jit(
            lambda state, *made: outside.import_inverses(
                self._layers(state), state, *made
            ),
            donate_argnums=0,
        )

    def __call__(self, state: T) -> T:
        """Exchanges factors and inverses with the process after a step.

        Args:
          state: a training state or an optimizer's; its curvature is donated.

        Returns:
          The state for the next step, with new inverses if some have arrived.

        Raises:
          RuntimeError: after ``close``.
        """
        if self._closed:
            raise RuntimeError(
                "this BackgroundInversion is closed; use it inside its with block, or "
                "make another"
            )
        self._calls += 1
        state = self._receive(state)
        if self._under_way is None and self._failures < _PATIENCE:
            self._send(state)
        # With a delay of 1 the inverses just begun are the next step's.
        return self._receive(state) if self._delay == 1 else state

    def __enter__(self) -> "BackgroundInversion":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def wait(self) -> None:
        """Waits until the inversion in progress ends; the next call uses its result."""
        if self._under_way is not None:
            wait([self._under_way])

    def close(self) -> None:
        """Ends the process; the inversion in progress is dropped."""
        self._closed = True
        if self._process is not None:
            self._process.kill()  # which ends the thread's wait for it
        self._thread.shutdown()
        self._stop()
        self._folder.cleanup()

    # ------------------------------------------------------------------ between steps

    def _send(self, state: Any) -> None:
        """Lets the thread send a copy of the factors to the process."""
        kfac_state = _curvature_state(state)
        _check_block_size(self._layers(kfac_state), kfac_state)
        # A copy, because the next step may donate the state's arrays.
        order = self._take_out(kfac_state)
        layers = self._layers(kfac_state)
        classes = unit_classes.classes_of(owners_in(layers, kfac_state))
        self._sent = self._calls
        self._under_way = self._thread.submit(self._invert, order, classes)

    def _receive(self, state: Any) -> Any:
        """Returns the state with inverses that have arrived or are due by the delay."""
        if self._under_way is None:
            return state
        if self._delay is None and not self._under_way.done():
            return state
        if self._delay is not None and self._calls < self._sent + self._delay - 1:
            return state
        under_way, self._under_way = self._under_way, None
        try:
            made = under_way.result()
        except Exception as error:  # of any kind, because training must go on
            self._note_failure(error)
            return state
        self._failures = 0
        shardings = jax.tree.map(lambda x: x.sharding, _curvature_state(state))

        def renewed(node: Any) -> Any:
            if not is_curvature_state(node):
                return node
            return jax.device_put(self._bring_in(node, *made), shardings)

        return jax.tree.map(renewed, state, is_leaf=is_curvature_state)

    def _note_failure(self, error: Exception) -> None:
        self._stop()
        self._failures += 1
        last = self._failures == _PATIENCE
        warnings.warn(
            f"inversion in the background failed at call {self._calls} "
            f"({type(error).__name__}: {error}); training goes on with the last good "
            "inverses, and "
            + ("no further attempt is made" if last else "a new process tries again"),
            RuntimeWarning,
            stacklevel=4,
        )

    def _layers(self, state: KfacState) -> dict[str, Any]:
        return {path: self._known[path] for path in sorted(plain(state.factors))}

    # ------------------------------------------------------------------- in the thread

    def _invert(self, order: outside.ExportedFactors, classes: Sequence[Any]) -> Any:
        """Sends the factors to the worker process and returns their inverses."""
        # Waits until the step is done and its results are on the host.
        factors, damping = jax.device_get((order.factors, order.damping))
        job = Job(
            [units.factor.invert for units in classes],
            [
                (x.shape, (len(x), units.factor.wire))
                for x, units in zip(factors, classes, strict=True)
            ],
            str(np.result_type(*factors)),
            str(pathlib.Path(self._folder.name, "factors")),
            str(pathlib.Path(self._folder.name, "inverses")),
            self._cores,
        )
        process = self._process
        if process is None:
            process = self._process = _start(job)
        assert process.stdin is not None
        assert process.stdout is not None
        inputs = inversion_worker.views(
            job.factors, inversion_worker.input_shapes(job), job.dtype, "r+"
        )
        # Through a file that both processes map: pipes would copy every number twice.
        for place, numbers in zip(inputs, (*factors, *damping), strict=True):
            place[:] = numbers
        process.stdin.write(b".")  # one byte for each job
        process.stdin.flush()
        try:
            error = pickle.load(process.stdout)
        except EOFError as end:
            status = process.wait()
            raise RuntimeError(f"the process ended with status {status}") from end
        if error is not None:
            raise RuntimeError(error)
        inverses = inversion_worker.views(
            job.inverses, [packed for _, packed in job.shapes], job.dtype, "r"
        )
        # Copies, because the process writes the next inverses to the same file.
        return [np.array(x) for x in inverses], order.known, order.made

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            # Closing flushes what the dead process will not read.
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def _start(job: Job) -> subprocess.Popen[bytes]:
    """Starts a worker process, which waits for its first job."""
    itemsize = np.dtype(job.dtype).itemsize
    for path, shapes in (
        (job.factors, inversion_worker.input_shapes(job)),
        (job.inverses, [packed for _, packed in job.shapes]),
    ):
        with open(path, "wb") as file:
            # Before the process maps it; a map cannot grow.
            file.truncate(itemsize * sum(int(np.prod(shape)) for shape in shapes))
    process = subprocess.Popen(
        [sys.executable, "-c", inversion_worker.PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdin is not None
    pickle.dump(job, process.stdin)
    process.stdin.flush()
    return process


def _check_cores(cores: Sequence[int]) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(
            f"cores={list(cores)} must be None on {sys.platform}, which cannot bind "
            "processes to cores; leave it out"
        )
    count = os.cpu_count() or 1
    if not cores or not all(0 <= core < count for core in cores):
        raise ValueError(
            f"cores={list(cores)} must be among the {count} of this host, numbered "
            "from 0; None for all"
        )


def _check_block_size(layers: dict[str, Layer], state: KfacState) -> None:
    """Raises ValueError if the optimizer cuts factors into other blocks."""
    axis = Axis(None, 1)
    if isinstance(state.factors, sharding.Sharded):
        axis = Axis("data", len(jax.tree.leaves(state.factors)[0]))
    for path, layer in layers.items():
        shapes, factors = layer.factor_shapes(), plain(state.factors)[path]
        for x, shape, f in zip(factors, shapes, layer.block.factors, strict=True):
            if x.size != shape.size // f.size * axis.share(f.size) * axis.size:
                raise ValueError(
                    f"block_size of BackgroundInversion must be the optimizer's, whose "
                    f"factors of {path!r} are cut otherwise; pass the same block_size "
                    "to both"
                )


def _curvature_state(state: Any) -> KfacState:
    """Returns a training state's curvature, if another process can invert it."""
    found = curvature_state(state)
    if found.moments:
        raise ValueError(
            "eigenvalues='corrected' must not be used with BackgroundInversion, whose "
            "new bases would not fit the second moments in the state; invert in the "
            "step, with Periods(delay=) to take it off the critical path"
        )
    if not all(x.is_fully_addressable for x in jax.tree.leaves(found)):
        raise ValueError(
            "opt_state must be on devices of this process alone; on several, invert in "
            "the step, with Periods(delay=) to take it off the critical path"
        )
    return found
