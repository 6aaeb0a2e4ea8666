"""Which process of which cluster this one is, read from what its launcher says.

Looked for, in this order:

- the variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID. jax reads the first by itself, the other two are read here;
- a step of Slurm: the variables that only `srun` sets. A batch script and the shell of
  `salloc` have SLURM_NTASKS and SLURM_PROCID too, yet nobody starts their other tasks;
- Open MPI's `mpirun`;
- Kubernetes with the package of `jax[k8s]`, and TPU pods, where jax asks the cluster.

JAX_COORDINATOR_ADDRESS, or JAX_COORDINATOR_PORT, alone overrides what Slurm or Open MPI
give. Ports are those that jax would choose.
"""

import glob
import importlib.util
import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

LOOKED_FOR = (
    "a step of Slurm (srun sets SLURM_STEP_NUM_TASKS and SLURM_PROCID), Open MPI "
    "(mpirun sets OMPI_COMM_WORLD_SIZE), a TPU pod, an indexed job of Kubernetes with "
    "jax[k8s] installed, or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
    "and JAX_PROCESS_ID"
)
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Membership(NamedTuple):
    """A process's place in its cluster.

    Attributes:
        launcher: What started the process.
        process: Its index.
        processes: How many there are.
        coordinator: Address, host:port, where process 0 listens.
        local_device_ids: GPUs that it may use; none: all of its host.
        hosts: The host of each process, where the launcher tells.
    """

    launcher: str
    process: int
    processes: int
    coordinator: str
    local_device_ids: tuple[int, ...] | None = None
    hosts: tuple[str, ...] = ()


def find(environ: Mapping[str, str]) -> Membership | None:
    """Reads the membership that a launcher left in the environment.

    Args:
        environ: Environment variables.

    Returns:
        The membership; none if there is no launcher, or if only jax can ask it.

    Raises:
        ValueError: If variables are missing or are no numbers, naming them.
    """
    explicit = [name for name in EXPLICIT if name in environ]
    if {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & set(explicit):
        if missing := [name for name in EXPLICIT if name not in environ]:
            raise ValueError(
                f"{' and '.join(explicit)} must come with {' and '.join(missing)}"
            )
        member = Membership(
            "JAX_COORDINATOR_ADDRESS",
            _number(environ, "JAX_PROCESS_ID"),
            _number(environ, "JAX_NUM_PROCESSES"),
            environ["JAX_COORDINATOR_ADDRESS"],
        )
    elif {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"} <= environ.keys():
        member = _slurm(environ)
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        member = _open_mpi(environ)
    else:
        return None
    if not 0 <= member.process < member.processes:
        raise ValueError(
            f"{member.launcher}: process {member.process} of {member.processes} cannot "
            "be; indices begin at 0"
        )
    if not re.fullmatch(r".+:\d+", member.coordinator):
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS must be host:port, got {member.coordinator!r}"
        )
    return member


def only_jax_can_ask(environ: Mapping[str, str]) -> str | None:
    """Names a cluster that tells jax alone who its members are, if there is one."""
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
    if indexed and importlib.util.find_spec("kubernetes"):
        return "Kubernetes"
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if devices and importlib.util.find_spec("libtpu"):
        return "TPU pod"
    return None


def _slurm(environ: Mapping[str, str]) -> Membership:
    names = expand_hosts(environ["SLURM_STEP_NODELIST"])
    tasks = expand_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    processes = _number(environ, "SLURM_STEP_NUM_TASKS")
    hosts = tuple(
        name for name, count in zip(names, tasks, strict=False) for _ in range(count)
    )
    # Other distributions of tasks over nodes put them in another order.
    in_blocks = re.match("block|$", environ.get("SLURM_DISTRIBUTION", ""))
    if len(hosts) != processes or not in_blocks:
        hosts = ()
    port = 61440 + _number(environ, "SLURM_JOB_ID") % 4096
    neighbours = tasks[_number(environ, "SLURM_NODEID")]
    return Membership(
        "Slurm",
        _number(environ, "SLURM_PROCID"),
        processes,
        _coordinator(environ, names[0], port),
        _local_device_ids(environ, _number(environ, "SLURM_LOCALID"), neighbours),
        hosts,
    )


def _open_mpi(environ: Mapping[str, str]) -> Membership:
    # Open MPI 5 tells no address. That of 4 is mpirun's own host, where process 0 need
    # not be.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^],]+))", uri)
    host, port = "", 0
    if found:
        host, port = found[2] or found[3], 61440 + int(found[1]) // 4096 % 4096
    elif "JAX_COORDINATOR_ADDRESS" not in environ:
        raise ValueError(
            "this Open MPI does not tell where process 0 is; start with "
            "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"
        )
    return Membership(
        "Open MPI",
        _number(environ, "OMPI_COMM_WORLD_RANK"),
        _number(environ, "OMPI_COMM_WORLD_SIZE"),
        _coordinator(environ, host, port),
        _local_device_ids(
            environ,
            _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
            _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ),
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    if not (value := environ.get(name, "")).isdecimal():
        raise ValueError(f"{name} must be a number, got {value!r}")
    return int(value)


def _coordinator(environ: Mapping[str, str], host: str, port: int) -> str:
    default = f"{host}:{environ.get('JAX_COORDINATOR_PORT', port)}"
    return environ.get("JAX_COORDINATOR_ADDRESS", default)


def _local_device_ids(
    environ: Mapping[str, str], rank: int, neighbours: int
) -> tuple[int, ...] | None:
    """The GPU of a process that shares its host; none where it may use all it sees.

    A process alone on its host uses all GPUs. One that the launcher bound to a GPU sees
    no other, and that one's number is 0 whatever its rank.
    """
    bound = len(environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    if "JAX_LOCAL_DEVICE_IDS" in environ or neighbours == 1 or bound:
        return None
    return (rank,)


def expand_hosts(names: str) -> list[str]:
    """Expands Slurm's list of hosts: `a[01-02,5],b` is `a01`, `a02`, `a5` and `b`.

    Args:
        names: Names divided by commas. Brackets hold numbers and ranges; a name may
            have several.

    Returns:
        The names in their order.
    """
    hosts = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", names):
        parts = re.split(r"\[([^\]]*)\]", name)
        parts[1::2] = [_expand_ranges(part) for part in parts[1::2]]
        parts[::2] = [[part] for part in parts[::2]]
        hosts += map("".join, itertools.product(*parts))
    return hosts


def _expand_ranges(ranges: str) -> list[str]:
    numbers = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        numbers += [
            str(number).zfill(len(first))
            for number in range(int(first), int(last or first) + 1)
        ]
    return numbers


def expand_tasks(counts: str) -> list[int]:
    """Expands Slurm's tasks per node: `2(x3),1` is 2, 2, 2 and 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
