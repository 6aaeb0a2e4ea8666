"""The roll call, and the links that remain, between threads over real sockets."""

import contextlib
import json
import queue
import socket
import threading
import time
from concurrent import futures

import pytest

from experiments import roll_call


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def hold(process, processes, address, *, timeout=30.0, hosts=()):
    return roll_call.hold(
        process, processes, address, timeout=timeout, keepalive=8, hosts=hosts
    )


def hold_all(processes, address):
    """The links of all processes, by index."""
    with futures.ThreadPoolExecutor() as pool:
        waiting = [pool.submit(hold, p, processes, address) for p in range(processes)]
        return [each.result() for each in waiting]


def test_all_come(address):
    for links in hold_all(4, address):
        assert links.hosts == (socket.gethostname(),) * 4
        links.close()


def test_the_absent_are_named_to_all(address):
    hosts = ["node016", "node017", "node017", "node020"]
    with futures.ThreadPoolExecutor() as pool:
        waiting = [
            pool.submit(hold, p, 4, address, timeout=1.0, hosts=hosts) for p in (0, 2)
        ]
        said = {str(each.exception()) for each in waiting}
    assert said == {
        "2 of 4 processes did not come within 1 s: process 1 (node017), "
        "process 3 (node020)"
    }


def test_an_absent_host_need_not_be_known(address):
    with pytest.raises(roll_call.AbsentError, match=r"process 1 \(host not known\)"):
        hold(0, 2, address, timeout=0.1)


def test_process_0_is_absent(address):
    with pytest.raises(roll_call.AbsentError, match=f"nobody answers at {address}"):
        hold(1, 2, address, timeout=0.1)


def test_process_0_dies_while_it_waits(address):
    host, port = address.split(":")
    with (
        socket.create_server((host, int(port))) as server,
        futures.ThreadPoolExecutor() as pool,
    ):
        waiting = pool.submit(hold, 1, 2, address)
        server.accept()[0].close()
        with pytest.raises(roll_call.AbsentError, match=r"process 0 .* ended before"):
            waiting.result()


def test_the_port_is_taken(address):
    port = int(address.split(":")[1])
    with (
        socket.create_server(("", port)),
        pytest.raises(roll_call.AbsentError, match=f"cannot listen at port {port}"),
    ):
        hold(0, 2, address)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        json.dumps({"process": 1, "processes": 3, "host": "other"}).encode() + b"\n",
        json.dumps({"process": 0, "processes": 2, "host": "other"}).encode() + b"\n",
    ],
)
def test_strangers_are_sent_away(address, said):
    host, port = address.split(":")
    with futures.ThreadPoolExecutor() as pool:
        first = pool.submit(hold, 0, 2, address)
        while True:
            try:
                stranger = socket.create_connection((host, int(port)), 10)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        with stranger:
            stranger.sendall(said)
            # It is away before the second comes, or it might be taken for it.
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
        second = pool.submit(hold, 1, 2, address)
        for each in (first, second):
            each.result().close()


class Watched:
    """Links of all processes under watch, each in the thread of its `with` block."""

    def __init__(self, address, processes):
        self.links = hold_all(processes, address)
        self.losses = [queue.Queue() for _ in self.links]
        self.ends = [threading.Event() for _ in self.links]
        self.pool = futures.ThreadPoolExecutor()
        self.blocks = [self.pool.submit(self._block, p) for p in range(processes)]

    def _block(self, process):
        def on_loss(lost, why):
            self.losses[process].put((lost, why))
            self.ends[process].set()

        with self.links[process].watched(on_loss):
            self.ends[process].wait()

    def die(self, process):
        """What the operating system does for a process that is killed."""
        # Its own watch must not speak between one connection's end and the next's.
        self.links[process]._done.set()
        for connection in self.links[process]._connections.values():
            connection.shutdown(socket.SHUT_RDWR)

    def finish(self, process):
        self.ends[process].set()
        self.blocks[process].result(timeout=10)

    def loss(self, process):
        return self.losses[process].get(timeout=10)


@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_process_is_named_to_the_others(address, lost):
    run = Watched(address, 4)
    run.die(lost)
    for other in {0, 1, 2, 3} - {lost}:
        assert run.loss(other) == (lost, "")
    for process in range(4):
        run.finish(process)
    run.pool.shutdown()


def test_those_who_end_well_are_not_missed(address):
    run = Watched(address, 3)
    run.finish(1)
    time.sleep(0.1)
    assert all(losses.empty() for losses in run.losses)
    # The rest still look after each other.
    run.die(2)
    assert run.loss(0) == (2, "")
    run.finish(0)
    run.finish(2)
    run.pool.shutdown()


@pytest.mark.parametrize("failing", [1, 0])
def test_a_process_that_fails_says_why(address, failing):
    run = Watched(address, 3)
    run.links[failing].fail("KeyError: 'x'")
    for other in {0, 1, 2} - {failing}:
        assert run.loss(other) == (failing, "KeyError: 'x'")
    for process in range(3):
        run.finish(process)
    run.pool.shutdown()


def test_what_all_refuse_is_told_by_each(address):
    run = Watched(address, 3)
    with futures.ThreadPoolExecutor() as pool:
        for each in [pool.submit(links.fail, "ValueError: no") for links in run.links]:
            each.result()
    assert all(losses.empty() for losses in run.losses)
    for process in range(3):
        run.finish(process)
    run.pool.shutdown()


def test_a_loss_explains_a_failure(address):
    """A collective's error may come before the news of the loss that caused it."""
    run = Watched(address, 3)
    with futures.ThreadPoolExecutor() as pool:
        failing = pool.submit(run.links[1].fail, "ValueError: Gloo all-reduce failed")
        run.die(2)
        assert run.loss(1) == (2, "")
        assert run.loss(0) == (2, "")
        failing.result()
    for process in range(3):
        run.finish(process)
    run.pool.shutdown()


def test_a_vanished_host_is_noticed_in_time(address):
    """The connections ask by themselves, and give up within the time allowed."""
    links = hold_all(2, address)
    for each in links:
        for connection in each._connections.values():
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                idle, interval, count = (
                    connection.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (
                        socket.TCP_KEEPIDLE,
                        socket.TCP_KEEPINTVL,
                        socket.TCP_KEEPCNT,
                    )
                )
                assert 0 < idle + interval * count <= 8
        each.close()
