"""Starting with others, and what a process says and returns when they are gone.

Two processes that start, stop together on SIGTERM, or lose one another are in
test_launch.py, as launchers start them.
"""

import os
import socket
import sys
import types

import jax
import pytest

from experiments import cluster, membership
from tests.experiments.test_membership import SLURM
from tests.test_processes import RunError, run_together

LAUNCHED = ("SLURM_", "OMPI_", "JAX_", "KUBERNETES_")


@pytest.fixture
def environ(monkeypatch):
    """An environment without a launcher; returns a function that adds to it."""
    for name in os.environ:
        if name.startswith(LAUNCHED) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)
    monkeypatch.setattr(membership, "only_jax_can_ask", lambda environ: None)
    return lambda changes: [monkeypatch.setenv(*item) for item in changes.items()]


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(mode, start_timeout=0.5):
    return cluster.start(mode, start_timeout=start_timeout, heartbeat_timeout=10)


def test_no_cluster(environ):
    assert start("off") == start("auto") == cluster.Cluster()
    assert start("auto").is_first()
    with pytest.raises(ValueError, match="no cluster is here") as refusal:
        start("on")
    for name in ("srun", "OMPI_COMM_WORLD_SIZE", "TPU", "Kubernetes", "JAX_PROCESS_ID"):
        assert name in str(refusal.value)


def test_a_step_of_one_task_is_joined_only_if_asked(environ):
    environ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert start("auto") == cluster.Cluster()


def test_notebooks_never_wait_for_others(environ, monkeypatch):
    environ(SLURM)
    kernel = types.ModuleType("ipykernel.kernelapp")
    monkeypatch.setitem(sys.modules, "ipykernel.kernelapp", kernel)
    assert start("auto") == cluster.Cluster()
    with pytest.raises(ValueError, match="not for notebooks"):
        start("on")


def test_the_absent_are_named_with_their_hosts(environ, capsys):
    """Process 0 of a step of Slurm, whose other six never start."""
    changes = {"SLURM_PROCID": "0", "JAX_COORDINATOR_PORT": str(free_port())}
    environ({**SLURM, **changes})
    with pytest.raises(SystemExit) as end:
        start("auto")
    assert end.value.code == cluster.ExitCode.UNAVAILABLE == os.EX_UNAVAILABLE
    assert capsys.readouterr().err == (
        "error: 6 of 7 processes did not come within 0.5 s: process 1 (node016), "
        "process 2 (node016), process 3 (node017), process 4 (node017), "
        "process 5 (node017), process 6 (node020)\n"
    )
    assert not jax.distributed.is_initialized()


def test_grpc_asks_no_proxy_for_the_coordinator(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    cluster._pass_by_proxies("node016:1")
    assert "no_grpc_proxy" not in os.environ
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setenv("no_grpc_proxy", "localhost")  # to be taken back after the test
    cluster._pass_by_proxies("[fe80::1]:1")
    # gRPC reads it in small letters only.
    assert dict(os.environ).items() >= {"no_grpc_proxy": "localhost,fe80::1"}.items()


def test_a_single_process_is_described_and_left_alone():
    alone = cluster.Cluster()
    assert alone.describe() == "1 process; 8 devices each; 8 x cpu"
    with (
        pytest.raises(ZeroDivisionError),
        cluster.others_may_die(alone, "never said") as reached,
    ):
        reached(1 // 0)


def workers(processes, **settings):
    """Commands of processes joined by the variables of jax, and their environment."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHED)}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(processes),
        **settings,
    }
    python = (sys.executable, "-m", "tests.experiments.cluster_worker")
    each = [("env", f"JAX_PROCESS_ID={p}", *python) for p in range(processes)]
    return each, env


def ends(processes, folder, **settings):
    """How each process ended, and what it said."""
    commands, env = workers(processes, **settings)
    with pytest.raises(RunError) as failure:
        run_together(commands, folder, timeout=300, grace=20, env=env)
    parts = str(failure.value).split("--- process ")[1:]
    return dict(enumerate(parts))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_survivors_end_at_once(tmp_path, lost):
    """Long before the heartbeats (10 s) are missed, whichever process is killed."""
    report = ends(3, tmp_path, WORKER_DIE=f"{lost}@3", WORKER_STEPS="1000")
    assert f"{lost} ended with -9" in report.pop(lost)
    for process, said in report.items():
        assert said.startswith(f"{process} ended with {cluster.ExitCode.UNAVAILABLE}:")
        assert (
            f"error: lost contact with process {lost} ({socket.gethostname()}) after "
            "step 3; start the job again with --resume"
        ) in said
    times = [(tmp_path / f"log{p}.txt").stat().st_mtime for p in range(3)]
    assert max(times) - times[lost] < 5


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_others(tmp_path, failing):
    report = ends(2, tmp_path, WORKER_FAIL=f"{failing}@3", WORKER_STEPS="1000")
    assert f"{failing} ended with {cluster.ExitCode.FAILED}:" in report[failing]
    assert "Traceback" in report[failing]
    assert "RuntimeError: a worker's own error" in report[failing]
    other = 1 - failing
    assert f"{other} ended with {cluster.ExitCode.UNAVAILABLE}:" in report[other]
    words = f"error: process {failing} ({socket.gethostname()}) failed after step 3: "
    assert f"{words}RuntimeError: a worker's own error" in report[other]


@pytest.mark.slow
def test_what_all_refuse_is_told_by_each(tmp_path):
    report = ends(2, tmp_path, WORKER_REFUSE="2")
    for process, said in report.items():
        assert said.startswith(f"{process} ended with {cluster.ExitCode.FAILED}:")
        assert "error: refused in step 2" in said
        assert "Traceback" not in said
