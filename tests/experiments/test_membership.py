"""What launchers leave in the environment is read as they mean it."""

import pytest

from experiments import membership
from experiments.membership import Membership

# As srun sets them for process 5 of 7 on nodes of 3, 3 and 1.
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[016-017,020]",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
}
# As mpirun of Open MPI 4 sets them; the address is the example of its own sources.
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("node1", "node1"),
        ("node1,login", "node1 login"),
        ("node[001-003]", "node001 node002 node003"),
        ("node[001,007-008],gpu2", "node001 node007 node008 gpu2"),
        ("node[8-11]", "node8 node9 node10 node11"),
        ("node[098-101]", "node098 node099 node100 node101"),
        ("r[1-2]n[3-4]-ib", "r1n3-ib r1n4-ib r2n3-ib r2n4-ib"),
        ("a[1],b[2-2],c.example.org", "a1 b2 c.example.org"),
    ],
)
def test_lists_of_hosts(names, expected):
    assert membership.expand_hosts(names) == expected.split()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2),16", [1, 2, 2, 16])],
)
def test_tasks_of_nodes(counts, expected):
    assert membership.expand_tasks(counts) == expected


def test_a_step_of_slurm():
    hosts = ("node016",) * 3 + ("node017",) * 3 + ("node020",)
    expected = Membership("Slurm", 5, 7, "node016:62016", (2,), hosts)
    assert 62016 == 61440 + 123456 % 4096
    assert membership.find(SLURM) == expected


def test_slurm_puts_tasks_elsewhere_if_told_so():
    found = membership.find(SLURM | {"SLURM_DISTRIBUTION": "cyclic"})
    assert found is not None
    assert found.hosts == ()
    found = membership.find(SLURM | {"SLURM_DISTRIBUTION": "block:cyclic"})
    assert found is not None
    assert found.hosts[6] == "node020"


def test_a_shell_of_slurm_is_no_step():
    """`salloc` and the batch script: four tasks are allowed, none was started."""
    shell = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    shell |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "a[1-4]"}
    assert membership.find(shell) is None
    # Where salloc's shell runs on a node it is a step, of one task.
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "a1"}
    step |= {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_TASKS_PER_NODE": "1"}
    found = membership.find(shell | step)
    assert found is not None
    assert found.processes == 1


def test_open_mpi():
    # 1531576320 is 4096 × 373920, and 373920 mod 4096 is 1184.
    expected = Membership("Open MPI", 3, 4, "10.96.0.1:62624", (1,))
    assert membership.find(OPEN_MPI) == expected
    uri = "1531576320.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"
    found = membership.find(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri})
    assert found == expected._replace(coordinator="fe80::b9b:ac5d:62624")


def test_open_mpi_5_must_be_told_where_process_0_is():
    fifth = {k: v for k, v in OPEN_MPI.items() if "orte" not in k}
    with pytest.raises(ValueError, match="mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"):
        membership.find(fifth)
    found = membership.find(fifth | {"JAX_COORDINATOR_ADDRESS": "gpu01:55527"})
    assert found == Membership("Open MPI", 3, 4, "gpu01:55527", (1,))


def test_the_variables_of_jax():
    found = membership.find(EXPLICIT)
    assert found == Membership("JAX_COORDINATOR_ADDRESS", 1, 2, "10.0.0.1:1234")
    # They come first, and the address alone replaces that of a launcher.
    assert membership.find(SLURM | EXPLICIT) == found
    address = {"JAX_COORDINATOR_ADDRESS": "node016-ib:7"}
    for launcher in (SLURM, OPEN_MPI):
        member = membership.find(launcher)
        assert member is not None
        expected = member._replace(coordinator="node016-ib:7")
        assert membership.find(launcher | address) == expected
    moved = membership.find(SLURM | {"JAX_COORDINATOR_PORT": "50000"})
    assert moved is not None
    assert moved.coordinator == "node016:50000"
    assert membership.find({}) is None
    assert membership.find(address) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (2,)),
        # srun bound the process to a GPU of its own; it sees one, whose number is 0.
        ({"CUDA_VISIBLE_DEVICES": "2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, (2,)),
        # The only process of its node has all the GPUs.
        ({"SLURM_NODEID": "2", "SLURM_LOCALID": "0"}, None),
        # jax reads this one by itself.
        ({"JAX_LOCAL_DEVICE_IDS": "1"}, None),
    ],
)
def test_one_gpu_a_process_where_several_share_a_host(change, expected):
    found = membership.find(SLURM | change)
    assert found is not None
    assert found.local_device_ids == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
        (EXPLICIT | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID must be a number"),
        (EXPLICIT | {"JAX_PROCESS_ID": "2"}, "process 2 of 2 cannot be"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "node1"}, "host:port, got 'node1'"),
        ({k: v for k, v in SLURM.items() if "PROCID" not in k}, "SLURM_PROCID must"),
    ],
)
def test_refused(environ, words):
    with pytest.raises(ValueError, match=words):
        membership.find(environ)
