"""The launch files start real processes, in the words that the experiment understands.

`srun`, `scontrol`, `mpirun` and `gcloud` are replaced by programs that do on this
machine what is asked of them, and `python` by one that runs `cluster_worker` in the
experiment's place; it begins by saying the command line that it got.
"""

import json
import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import tyro
import yaml

from experiments import cluster, imagenet_resnet50
from experiments.settings import Config
from tests.test_processes import ROOT, RunError, run_together

LAUNCH = ROOT / "experiments" / "launch"
PROCESSES = 2

# What the fakes of srun and mpirun share: run the command once a process, pass on what
# they say in whole lines, and end as srun does, with the highest code, 128 + its number
# for a signal.
START = """#!{python}
import os, subprocess, sys, threading
command = sys.argv[1:]
each = []
while command[0].startswith("-"):
    option = command.pop(0)
    if option in ("--hostfile", "--map-by"):
        command.pop(0)
    if option == "-x" and "=" in (variable := command.pop(0)):
        os.environ.update([variable.split("=", 1)])
for rank in map(str, range({processes})):
    env = {{{variables}}}
    said = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    each.append(subprocess.Popen(command, env=os.environ | env, **said))
def pass_on(process):
    for line in process.stdout:
        os.write(1, line)
passing = [threading.Thread(target=pass_on, args=[process]) for process in each]
for thread in passing:
    thread.start()
for thread in passing:
    thread.join()
codes = [process.wait() for process in each]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SRUN = """
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "{n}", "SLURM_STEP_TASKS_PER_NODE": "{n}",
    "SLURM_PROCID": rank, "SLURM_LOCALID": rank,
"""
MPIRUN = """
    "OMPI_COMM_WORLD_SIZE": "{n}", "OMPI_COMM_WORLD_LOCAL_SIZE": "{n}",
    "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank,
"""


def start(variables):
    variables = variables.format(n=PROCESSES)
    return START.format(python=sys.executable, processes=PROCESSES, variables=variables)


PROGRAMS = {
    "srun": start(SRUN),
    "mpirun": start(MPIRUN),
    "scontrol": '#!/bin/sh\necho "scontrol $@"\n',
    "gcloud": '#!/bin/sh\nfor last; do :; done\ncd "$HOME"\n'
    'exec bash -c "${last#--command=}"\n',
    "python": "#!/bin/sh\n"
    f'exec {sys.executable} -m tests.experiments.cluster_worker "$@"\n',
}


@pytest.fixture
def env(tmp_path):
    """An environment in which the programs are found, and no other launcher is."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
    launched = ("SLURM_", "OMPI_", "JAX_")
    mine = {k: v for k, v in os.environ.items() if not k.startswith(launched)}
    return mine | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COORDINATOR_PORT": port,
        "PORT": port,
        "WORKER_STEPS": "2000",
        "DATA": "/data",
        "RUNS": "/runs",
    }


def run(command, folder, env):
    """The code that a launch file ends with, and all that was said."""
    try:
        run_together([command], folder, timeout=240, env=env)
    except RunError as error:
        if not (code := re.match(r"--- process 0 ended with (\d+):", str(error))):
            raise
        return int(code[1]), (folder / "log0.txt").read_text()
    return 0, (folder / "log0.txt").read_text()


def check_command_line(words, directory):
    """The experiment's own parser takes the command line and finds what is meant."""
    program, name, *flags = words
    assert (ROOT / program).is_file()
    config = tyro.cli(Config, args=flags, default=imagenet_resnet50.CONFIGS[name])
    assert config.devices == 0
    assert config.distributed == "on"
    assert config.resume
    assert config.directory == Path(directory)
    assert config.data_dir.is_absolute()
    return config


def command_lines(said):
    return [json.loads(line) for line in re.findall(r"^\[\".*\]$", said, re.MULTILINE)]


def test_slurm_saves_and_begins_again(tmp_path, env):
    """SIGTERM to one process: both stop at the same step, and the job is requeued."""
    job = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
    command = ["bash", str(LAUNCH / "slurm.sh"), "lars_8k", "--seed", "3"]
    code, said = run(command, tmp_path, env | job | {"WORKER_TERM": "1@3"})
    assert code == cluster.ExitCode.PREEMPTED == os.EX_TEMPFAIL
    assert "2 processes; 2 x cpu" in said
    stops = re.findall(r"^saved at (\d+)$", said, re.MULTILINE)
    assert len(stops) == PROCESSES
    assert len(set(stops)) == 1
    assert int(stops[0]) > 3
    assert said.endswith("scontrol requeue 77\n")
    lines = command_lines(said)
    assert len(lines) == PROCESSES
    for words in lines:
        assert check_command_line(words, "/runs/77").seed == 3


def test_open_mpi_and_a_lost_process(tmp_path, env):
    """One process is killed: the other ends at once and says so."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=2\n")
    command = ["bash", str(LAUNCH / "mpirun.sh"), str(hosts), "2", "sp_ngd_4k"]
    code, said = run(command, tmp_path, env | {"WORKER_DIE": "1@3"})
    assert code == 128 + 9  # of the process that was killed
    assert "2 processes; 2 x cpu" in said
    assert "error: lost contact with another process (UNKNOWN: Gloo" in said
    assert "its log says why; start the job again with --resume" in said
    for words in command_lines(said):
        check_command_line(words, "/runs/mpirun")


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        *((69, None, True), (134, 0, True), (137, 19, True), (75, 500, True)),
        *((69, 20, False), (1, None, False), (139, None, False)),
    ],
)
def test_which_ends_of_a_job_of_slurm_begin_again(tmp_path, env, code, restarts, again):
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    job = {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "1"}
    if restarts is not None:
        job["SLURM_RESTART_COUNT"] = str(restarts)
    command = ["bash", str(LAUNCH / "slurm.sh"), "kfac"]
    said = "scontrol requeue 77\n" if again else ""
    assert run(command, tmp_path, env | job) == (code, said)


def test_tpu_pod(tmp_path, env):
    """The command that each host is sent, by a shell that does not wait for its end."""
    python = tmp_path / "lbopt" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        "print(json.dumps(sys.argv[1:]), os.getpid(), os.getsid(0))\n"
    )
    python.chmod(0o755)
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), "kfac", "--kfac.damping", "1e-3"]
    pod = {"HOME": str(tmp_path), "TPU": "pod", "ZONE": "here"}
    assert run(command, tmp_path, env | pod) == (0, "")
    home = tmp_path / "lbopt"
    (home / "go").touch()  # the connection is closed by now, and the process goes on
    for _ in range(1000):
        if said := (home / "tpu_pod.log").read_text():
            break
        time.sleep(0.02)
    words, _, ids = said.rpartition("] ")
    words = json.loads(f"{words}]")
    assert check_command_line(words, "/runs/pod").kfac.damping == 1e-3
    pid = (home / "tpu_pod.pid").read_text().strip()
    assert ids.split() == [pid, pid], "a session of its own"


def test_kubernetes():
    text = (LAUNCH / "kubernetes.yaml").read_text()
    [jobs] = yaml.safe_load_all(text)
    name = jobs["metadata"]["name"]
    [workers] = jobs["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    [train] = job["template"]["spec"]["containers"]
    check_command_line([train["command"][1], *train["args"]], "/mnt/runs/sp_ngd_4k")
    given = {variable["name"]: variable for variable in train["env"]}
    # The names that JobSet gives to pods, and one number of pods everywhere.
    address = f"{name}-{workers['name']}-0-0.{name}:55527"
    assert given["JAX_COORDINATOR_ADDRESS"]["value"] == address
    assert int(given["JAX_NUM_PROCESSES"]["value"]) == job["completions"]
    assert job["completions"] == job["parallelism"]
    field = given["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [cluster.ExitCode.FAILED]
    assert rule["onExitCodes"]["containerName"] == train["name"]
    mounts = {mount["name"] for mount in train["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_the_rights_that_jax_needs_to_ask_kubernetes():
    text = (LAUNCH / "README.md").read_text()
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    role, binding = yaml.safe_load_all(block)
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    rights = {
        resource: rule["verbs"]
        for rule in role["rules"]
        for resource in rule["resources"]
    }
    # jax 0.10.2 lists pods and services, and reads the job.
    assert "list" in rights["pods"]
    assert "list" in rights["services"]
    assert "get" in rights["jobs"]
