"""A roll call before jax starts, and links that tell at once when a process is gone.

jax's client ends the program (SIGABRT, no Python exception) if not all processes come
within its timeout, and does not say which. So process 0 first calls the roll: the
others connect to it and say who they are; when all are there, or time is up, it answers
them all alike. It listens on the coordinator's own port, which jax takes over after.

The connections stay open. The operating system closes them when a process ends, however
it ends, and its keepalive finds a host that has vanished, so nobody need send anything
while all is well. What is said, one line each:

    other -> 0   {"process": 1, "processes": 4, "host": "node002"}
    0 -> other   {"hosts": ["node001", ...]}   all are there
    0 -> other   {"error": "1 of 4 ..."}       they are not
    both ways    {"bye": true}                 I end, and that is right
    both ways    {"lost": 2, "why": ""}        process 2 is gone; or I am, and why
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

LINE = 1 << 20  # bytes; the longest has a host name for each process
ANSWER = 10.0  # seconds that whoever connects has to say a line


class AbsentError(Exception):
    """Processes did not come; says which."""


class Links:
    """Connections between process 0 and each of the others.

    Args:
        process: Index of this process. Process 0 tells the others who is lost.
        connections: Connections by the index of the process at the other end.
        hosts: The host of each process.
    """

    def __init__(
        self,
        process: int,
        connections: Mapping[int, socket.socket],
        hosts: Sequence[str],
    ):
        self.hosts = tuple(hosts)
        self._process = process
        self._connections = dict(connections)
        self._failing, self._done = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def watched(self, on_loss: Callable[[int, str], None]) -> Iterator[None]:
        """Watches the processes; once only, for all links are closed after it.

        Args:
            on_loss: Called from another thread with the index of a process that is
                gone, and why if it could say. It should end this process; it is called
                once.

        Yields:
            Nothing. If the block is left by an exception nobody is told: see `fail`.
        """
        thread = threading.Thread(
            target=self._watch, args=(on_loss,), name="links", daemon=True
        )
        thread.start()
        yield
        self._done.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                _say(connection, {"bye": True})
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()
        self.close()

    def fail(self, why: str) -> None:
        """Tells the others that this process is about to end, and why.

        The reason may be that another one is gone, of which the news is then on its
        way: it gets a second, in which `on_loss` may be called. That others fail too is
        no such news: what all refuse is told by each.

        Args:
            why: The error, on one line.
        """
        self._failing.set()
        time.sleep(1)
        self._done.set()
        self._tell({"lost": self._process, "why": why})

    def close(self) -> None:
        """Closes all connections."""
        for connection in self._connections.values():
            connection.close()

    def _watch(self, on_loss: Callable[[int, str], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for process, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    said = _hear(self._connections[key.data])
                    lost, why = said.get("lost", key.data), said.get("why", "")
                    if self._done.is_set():
                        return
                    if "bye" in said or (why and self._failing.is_set()):
                        selector.unregister(key.fileobj)
                        continue
                    if self._process == 0:
                        self._tell({"lost": lost, "why": why})
                    return on_loss(lost, why)

    def _tell(self, loss: Mapping[str, Any]) -> None:
        others = [c for p, c in self._connections.items() if p != loss["lost"]]
        for connection in others:
            with contextlib.suppress(OSError):
                _say(connection, loss)
        # Without process 0 jax would abort the others before they can speak.
        deadline = time.monotonic() + (2 if self._process == 0 else 0)
        for connection in others:
            with contextlib.suppress(OSError):
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                connection.recv(1)


def hold(
    process: int,
    processes: int,
    address: str,
    *,
    timeout: float,
    keepalive: int,
    hosts: Sequence[str] = (),
) -> Links:
    """Waits until all processes are there.

    Args:
        process: Index of this one.
        processes: How many there are.
        address: Where process 0 listens, host:port.
        timeout: Seconds to wait at most.
        keepalive: Seconds within which a host that vanished is noticed.
        hosts: Where each process should be, if known.

    Returns:
        The connections, still open.

    Raises:
        AbsentError: If a process did not come, with the same words in each that did.
    """
    deadline = time.monotonic() + timeout
    if process == 0:
        return _call(processes, address, deadline, timeout, keepalive, hosts)
    return _come(process, processes, address, deadline, timeout, keepalive)


def _call(processes, address, deadline, timeout, keepalive, hosts) -> Links:
    came: dict[int, tuple[socket.socket, str]] = {}
    with _listen(address, processes) as server:
        while len(came) < processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                _keep_alive(connection, keepalive)
                said = _hear(connection)
                who = said.get("process", 0)
                # Anything may knock at an open port.
                if said.get("processes") != processes or who not in range(1, processes):
                    connection.close()
                    continue
                if who in came:  # it was started anew
                    came[who][0].close()
                came[who] = connection, said.get("host", "")
    connections = {process: connection for process, (connection, _) in came.items()}
    absent = [p for p in range(1, processes) if p not in came]
    if absent:
        named = ", ".join(name(p, hosts) for p in absent)
        error = (
            f"{len(absent)} of {processes} processes did not come within {timeout:g} s:"
            f" {named}"
        )
        answer: dict[str, Any] = {"error": error}
    else:
        there = [socket.gethostname(), *(came[p][1] for p in range(1, processes))]
        answer = {"hosts": there}
    for connection in connections.values():
        with contextlib.suppress(OSError):  # its watch will tell, or nobody is left
            _say(connection, answer)
    if absent:
        for connection in connections.values():
            connection.close()
        raise AbsentError(answer["error"])
    return Links(0, connections, answer["hosts"])


def _come(process, processes, address, deadline, timeout, keepalive) -> Links:
    host, _, port = address.rpartition(":")
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), ANSWER)
            break
        except OSError as error:  # not there yet, or its name not known yet
            if time.monotonic() > deadline:
                raise AbsentError(
                    f"1 of {processes} processes did not come within {timeout:g} s: "
                    f"process 0, nobody answers at {address} ({error})"
                ) from None
        time.sleep(0.2)
    _keep_alive(connection, keepalive)
    me = {"process": process, "processes": processes, "host": socket.gethostname()}
    _say(connection, me)
    # Process 0 may have begun to wait just now.
    connection.settimeout(timeout + ANSWER)
    said = _hear(connection)
    if "hosts" not in said:
        connection.close()
        ended = f"process 0 at {address} ended before all processes came"
        raise AbsentError(said.get("error", ended))
    connection.settimeout(ANSWER)
    return Links(process, {0: connection}, said["hosts"])


def name(process: int, hosts: Sequence[str]) -> str:
    """Names a process with its host, if that is known."""
    host = hosts[process] if process < len(hosts) else "host not known"
    return f"process {process} ({host})"


def _listen(address: str, processes: int) -> socket.socket:
    port = int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, backlog=processes, dualstack_ipv6=both
        )
    except OSError as error:
        raise AbsentError(
            f"process 0 cannot listen at port {port} ({error.strerror}); choose "
            "another by JAX_COORDINATOR_PORT or JAX_COORDINATOR_ADDRESS"
        ) from error


def _keep_alive(connection: socket.socket, seconds: int) -> None:
    connection.settimeout(ANSWER)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # A quarter of the time until it asks, three eighths for three questions.
    options = {"TCP_KEEPIDLE": seconds // 4, "TCP_KEEPINTVL": seconds // 8}
    for option, value in {**options, "TCP_KEEPCNT": 3}.items():
        if hasattr(socket, option):  # not the first on macOS
            number = getattr(socket, option)
            connection.setsockopt(socket.IPPROTO_TCP, number, max(value, 1))


def _say(connection: socket.socket, what: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(what).encode() + b"\n")


def _hear(connection: socket.socket) -> dict[str, Any]:
    """The next line; nothing if the other end is gone or speaks another language."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < LINE:
            if not (byte := connection.recv(1)):
                return {}
            line += byte
        said = json.loads(line)
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
