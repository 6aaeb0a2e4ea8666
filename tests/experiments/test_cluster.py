"""Joining the other processes, and the end of a process when they are gone.

Processes that stop together on SIGTERM, and launchers, are in test_launch.py.
"""

import os
import signal
import socket
import sys
import types

import jax
import pytest

from experiments import cluster
from tests.test_processes import RunError, run_together

LAUNCHED = ("SLURM_", "OMPI_", "JAX_", "KUBERNETES_")


@pytest.fixture
def environ(monkeypatch):
    """An environment without a launcher; returns a function that adds to it."""
    for name in os.environ:
        if name.startswith(LAUNCHED) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: [])
    # The tests' own devices are there already; nobody is joined in earnest here.
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    return lambda changes: [monkeypatch.setenv(*item) for item in changes.items()]


@pytest.fixture
def joined(monkeypatch):
    """What jax is asked for in the place of joining others."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: asked.append(kw))
    return asked


def start(mode):
    cluster.start(mode, start_timeout=0.5, heartbeat_timeout=10)


def test_no_cluster(environ):
    start("off")
    start("auto")
    with pytest.raises(ValueError, match="distributed='on' finds no other") as refusal:
        start("on")
    for name in ("srun", "mpirun", "TPU", "Kubernetes", "JAX_PROCESS_ID"):
        assert name in str(refusal.value)


EXPLICIT = {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
TIMEOUTS = {"initialization_timeout": 1, "heartbeat_timeout_seconds": 10}


@pytest.mark.parametrize(
    ("variables", "joins"),
    [
        (EXPLICIT, True),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "7"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        # `salloc` and the batch script: four tasks are allowed, none was started.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        (KUBERNETES, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"TPU": "yes"}, True),
    ],
)
def test_auto_joins_several_processes_only(
    environ, joined, monkeypatch, variables, joins
):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    devices = ["/dev/accel0"] if "TPU" in variables else []
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: devices)
    environ(variables)
    start("auto")
    place = {"num_processes": 3, "process_id": 2}
    place |= {"cluster_detection_method": "deactivate"}
    expected = TIMEOUTS | (place if variables is EXPLICIT else {})
    assert joined == [expected] * joins


def test_notebooks_wait_for_others_only_if_asked(environ, joined, monkeypatch):
    environ(EXPLICIT)
    kernel = types.ModuleType("ipykernel.kernelapp")
    monkeypatch.setitem(sys.modules, "ipykernel.kernelapp", kernel)
    start("auto")
    assert not joined
    start("on")
    assert len(joined) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one' must be a whole number"),
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES='' must be a whole number"),
        ({"JAX_PROCESS_ID": "3"}, "process_id < num_processes"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_incomplete_variables_are_refused(environ, change, words):
    environ(EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"} | change)
    with pytest.raises(ValueError, match=words):
        start("auto")


def test_a_single_process_is_described_and_left_alone():
    assert cluster.describe() == "1 process; 8 x cpu"
    with pytest.raises(ZeroDivisionError), cluster.fail_fast("never said"):
        _ = 1 // 0


def workers(processes, **settings):
    """Commands of processes joined by the variables of jax, and their environment."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHED)}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        **settings,
    }
    python = (sys.executable, "-m", "tests.experiments.cluster_worker")
    each = [("env", f"JAX_PROCESS_ID={p}", *python) for p in range(processes)]
    return each, env


def ends(commands, env, folder):
    """How each process ended, and what it said."""
    with pytest.raises(RunError) as failure:
        run_together(commands, folder, timeout=300, grace=20, env=env)
    parts = str(failure.value).split("--- process ")[1:]
    return dict(enumerate(parts))


@pytest.mark.parametrize("present", [0, 1])
def test_who_waits_in_vain_is_ended_by_jax_and_told_what_to_look_at(tmp_path, present):
    commands, env = workers(2, WORKER_START="1")
    report = ends(commands[present : present + 1], env, tmp_path)
    assert report[0].startswith(f"0 ended with {-signal.SIGABRT}:")
    name = socket.gethostname()
    assert f"{name}: waiting up to 1 s for the other processes" in report[0]
    assert "whose log lacks this line, or a closed port of process 0" in report[0]
    assert "DEADLINE_EXCEEDED" in report[0]  # in jax's own words


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_survivors_end_at_once(tmp_path, lost):
    """On a CPU long before the heartbeats (10 s) are missed; jax may be the faster."""
    commands, env = workers(3, WORKER_DIE=f"{lost}@3", WORKER_STEPS="1000")
    report = ends(commands, env, tmp_path)
    assert f"{lost} ended with -9" in report.pop(lost)
    for process, said in report.items():
        if said.startswith(f"{process} ended with {-signal.SIGABRT}:"):
            assert "most likely indicates that another task died" in said
        else:
            assert said.startswith(
                f"{process} ended with {cluster.ExitCode.UNAVAILABLE}:"
            )
            assert "error: lost contact with another process" in said
            assert "its log says why; start the job again with --resume" in said
    times = [(tmp_path / f"log{p}.txt").stat().st_mtime for p in range(3)]
    assert max(times) - times[lost] < 5


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path):
    commands, env = workers(2, WORKER_FAIL="1@3", WORKER_STEPS="1000")
    report = ends(commands, env, tmp_path)
    assert report[1].startswith(f"1 ended with {cluster.ExitCode.FAILED}:")
    assert "Traceback" in report[1]
    assert "RuntimeError: a worker's own error" in report[1]
    assert report[0].startswith(f"0 ended with {cluster.ExitCode.UNAVAILABLE}:")


@pytest.mark.slow
def test_what_all_refuse_is_told_by_each(tmp_path):
    report = ends(*workers(2, WORKER_REFUSE="2"), tmp_path)
    for process, said in report.items():
        assert said.startswith(f"{process} ended with {cluster.ExitCode.FAILED}:")
        assert "error: refused in step 2" in said
        assert "Traceback" not in said
