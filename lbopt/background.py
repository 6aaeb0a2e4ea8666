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
from lbopt.curvature.registry import Layers
from lbopt.inversion_worker import Job
from lbopt.transforms import outside, unit_classes
from lbopt.transforms.kfac_state import KfacState, plain
from lbopt.transforms.reshard import owners_in

T = TypeVar("T")

# So often in a row may inversion fail before it is given up.
_PATIENCE = 3


class BackgroundInversion:
    """Renews an optimizer's inverses from another process; training never waits.

    Called between steps with the training state: it hands the latest factors over as
    soon as the process is idle, and puts inverses into the state as soon as they have
    come.  Each inverse in effect is then of factors of some steps ago, as old as
    ``lbopt.inverse_age`` says.

    The state is whole at every moment: it may be saved whenever one likes, and what is
    under way in the process is only lost time.  Where inversion fails, or the process
    dies, a warning says so, training goes on with the last good inverses, and a new
    process tries again, three times in a row at most.

    Args:
      layers: what ``trace_layers`` found.
      block_size: what the optimizer was made with.
      delay: steps after which inverses have effect: those of the factors of step t at
        step t + delay, as with ``Periods.delay``.  If they have not come by then, they
        are waited for, so that a run's numbers do not depend on its speed.  None for as
        soon as possible.
      cores: CPU cores that the process stays on; None for any.

    Raises:
      ValueError: for settings out of range, and, when called, for a state without a
        curvature transform, or one that lies on several hosts.

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

    Source: Ba, Grosse & Martens 2017, §3.  Of the authors' code one inverts block after
    block (tensorflow/kfac), one all with a queue of one (baselines), as here.  There
    the first steps go without curvature; here the step itself makes the first inverses.
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
        self._known = sharding.configured(layers.preconditioned, block_size=block_size)
        self._delay, self._cores = delay, cores
        self._folder = tempfile.TemporaryDirectory(prefix="lbopt-")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lbopt-background")
        self._process: subprocess.Popen[bytes] | None = None
        self._under_way: Future[Any] | None = None
        self._calls = self._sent = self._failures = 0
        self._take_out = jax.jit(
            lambda state: outside.take_out(self._own(state), state)
        )
        self._bring_in = jax.jit(
            lambda state, *made: outside.bring_in(self._own(state), state, *made),
            donate_argnums=0,
        )

    def __call__(self, state: T) -> T:
        """The state with new inverses, if there are; the old one is donated.

        Args:
          state: a training state or an optimizer's, after a step.

        Returns:
          The state for the next step.
        """
        self._calls += 1
        state = self._receive(state)
        if self._under_way is None and self._failures < _PATIENCE:
            self._send(state)
        return self._receive(state) if self._delay == 1 else state

    def __enter__(self) -> "BackgroundInversion":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def wait(self) -> None:
        """Waits until what is under way has come; the next call puts it in."""
        if self._under_way is not None:
            wait([self._under_way])

    def close(self) -> None:
        """Ends the process; what is under way is dropped."""
        if self._process is not None:
            self._process.kill()  # and the thread waits for it no longer
        self._thread.shutdown()
        self._stop()
        self._folder.cleanup()

    # ------------------------------------------------------------------ between steps

    def _send(self, state: Any) -> None:
        """Lets the thread hand a copy of the factors over."""
        kfac_state = _curvature_state(state)
        # A copy, because the next step may reuse the memory of the state's own.
        order = self._take_out(kfac_state)
        own = self._own(kfac_state)
        classes = unit_classes.classes_of(owners_in(own, kfac_state))
        self._sent = self._calls
        self._under_way = self._thread.submit(self._invert, order, classes)

    def _receive(self, state: Any) -> Any:
        """The state with the inverses that have come, or whose time it is."""
        if self._under_way is None:
            return state
        if self._delay is None and not self._under_way.done():
            return state
        if self._delay is not None and self._calls < self._sent + self._delay - 1:
            return state
        under_way, self._under_way = self._under_way, None
        try:
            made = under_way.result()
        except Exception as error:  # of any kind: training goes on
            self._note_failure(error)
            return state
        self._failures = 0
        shardings = jax.tree.map(lambda x: x.sharding, _curvature_state(state))

        def renewed(node: Any) -> Any:
            if not isinstance(node, KfacState):
                return node
            return jax.device_put(self._bring_in(node, *made), shardings)

        return jax.tree.map(renewed, state, is_leaf=_is_curvature_state)

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

    def _own(self, state: KfacState) -> dict[str, Any]:
        return {path: self._known[path] for path in sorted(plain(state.factors))}

    # ------------------------------------------------------------------- in the thread

    def _invert(self, order: outside.Order, classes: Sequence[Any]) -> Any:
        """What the process makes of factors."""
        # Waits until the step is done and the numbers are here.
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
        for place, numbers in zip(inputs, (*factors, *damping), strict=True):
            place[:] = numbers
        process.stdin.write(b".")
        process.stdin.flush()
        try:
            error = pickle.load(process.stdout)
        except EOFError as end:
            status = process.wait()
            raise RuntimeError(f"the process ended with status {status}") from end
        if error is not None:
            raise RuntimeError(error)
        wires = inversion_worker.views(
            job.inverses, [wire for _, wire in job.shapes], job.dtype, "r"
        )
        # Copies: the process writes the next ones into the same file.
        return [np.array(x) for x in wires], order.known, order.made

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def _start(job: Job) -> subprocess.Popen[bytes]:
    """A process that waits for its first command."""
    itemsize = np.dtype(job.dtype).itemsize
    for path, shapes in (
        (job.factors, inversion_worker.input_shapes(job)),
        (job.inverses, [wire for _, wire in job.shapes]),
    ):
        with open(path, "wb") as file:
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
        raise ValueError(f"cores={list(cores)} cannot be chosen on {sys.platform}")
    there = os.cpu_count() or 1
    if not cores or not all(0 <= core < there for core in cores):
        raise ValueError(f"cores={list(cores)} must be among the {there} of this host")


def _is_curvature_state(node: Any) -> bool:
    return isinstance(node, KfacState)


def _curvature_state(state: Any) -> KfacState:
    """The one state of a curvature transform in a training state."""
    nodes = jax.tree.leaves(state, is_leaf=_is_curvature_state)
    found = [node for node in nodes if isinstance(node, KfacState)]
    if len(found) != 1:
        raise ValueError(
            f"state={type(state).__name__} holds {len(found)} curvature transforms, "
            "not one; pass the state of an optimizer made with "
            "lbopt.scale_by_kfac(..., periods=lbopt.Periods(inverses=None))"
        )
    if found[0].moments:
        raise ValueError(
            "the state has second moments in its eigenbases (eigenvalues='corrected'), "
            "which new bases would leave behind; invert in the step, with "
            "Periods(delay=) to take it off the critical path"
        )
    if not all(x.is_fully_addressable for x in jax.tree.leaves(found[0])):
        raise ValueError(
            "the state lies on devices of several processes, of which each sees its "
            "own; invert in the step, with Periods(delay=) to take it off the critical "
            "path"
        )
    return found[0]
