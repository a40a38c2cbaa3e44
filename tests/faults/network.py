"""Networks between a client and a server that can be pulled, and put back.

A pair of network namespaces where this machine lets a test make them; and a proxy that stops to forward, everywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import pytest


class Network(ABC):
    """A way from a client to the server at 127.0.0.1:`port`; `cut` and `mend` are what happens to it."""

    address = ""
    """Where the client finds the server."""
    prefix: Sequence[str] = ()
    """Put before the client's command."""

    @abstractmethod
    def open(self, port: int) -> None:
        """Lays it."""

    @abstractmethod
    def cut(self) -> None:
        """From now on nothing comes through, and nobody is told."""

    @abstractmethod
    def mend(self) -> None:
        """It is as it was."""

    @abstractmethod
    def close(self) -> None:
        """Takes it away."""


class Namespace(Network):
    """The client is in a network namespace of its own, at the other end of a pair of virtual devices."""

    _SERVER, _CLIENT = "10.213.77.1", "10.213.77.2"
    _numbers = itertools.count()

    def __init__(self) -> None:
        self._name = f"ob{os.getpid()}-{next(self._numbers)}"  # the devices of the one before may still be going
        self._near, self._far = f"{self._name}a", f"{self._name}b"

    def open(self, port: int) -> None:
        """Makes namespace and devices; skips the test where no namespace may be made, and for nothing else."""
        if shutil.which("ip") is None:
            pytest.skip("no network namespaces can be made here: there is no `ip`")
        made = subprocess.run(["ip", "netns", "add", self._name], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no network namespaces can be made here: {made.stderr.strip()}")
        try:
            for command in (
                f"link add {self._near} type veth peer name {self._far} netns {self._name}",
                f"addr add {self._SERVER}/30 dev {self._near}",
                f"link set {self._near} up",
                f"-n {self._name} addr add {self._CLIENT}/30 dev {self._far}",
                f"-n {self._name} link set {self._far} up",
            ):
                self.ip(command)
        except BaseException:
            self.close()
            raise
        self.address, self.prefix = f"{self._SERVER}:{port}", ("ip", "netns", "exec", self._name)

    def close(self) -> None:
        """The namespace alone would take the devices with it some time later, and its address until then."""
        subprocess.run(["ip", "link", "del", self._near], capture_output=True)
        subprocess.run(["ip", "netns", "del", self._name], capture_output=True)

    def ip(self, command: str) -> None:
        """Runs `ip`."""
        subprocess.run(["ip", *command.split()], check=True)


class Unplugged(Namespace):
    """The client's device goes down."""

    def cut(self) -> None:
        """Down."""
        self.ip(f"-n {self._name} link set {self._far} down")

    def mend(self) -> None:
        """Up."""
        self.ip(f"-n {self._name} link set {self._far} up")


class Swallowed(Namespace):
    """Packets of both go out and reach nobody: to an Ethernet address that nobody has."""

    def cut(self) -> None:
        """Tells both a wrong address of the other."""
        nobody = "lladdr 02:00:00:00:00:99 nud permanent"
        self.ip(f"neigh replace {self._CLIENT} dev {self._near} {nobody}")
        self.ip(f"-n {self._name} neigh replace {self._SERVER} dev {self._far} {nobody}")

    def mend(self) -> None:
        """Lets them ask again."""
        self.ip(f"neigh del {self._CLIENT} dev {self._near}")
        self.ip(f"-n {self._name} neigh del {self._SERVER} dev {self._far}")


class Proxy(Network):
    """Connections go through this process, which stops to forward and closes nothing."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._through = threading.Event()

    def open(self, port: int) -> None:
        """Listens."""
        self._port = port
        self._through.set()
        listener = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(listener)
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._begin(self._accept, listener)

    def cut(self) -> None:
        """Reads no more."""
        self._through.clear()

    def mend(self) -> None:
        """Goes on with what had come."""
        self._through.set()

    def close(self) -> None:
        """Ends all connections."""
        self._through.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in self._sockets:
            one.close()

    def _begin(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._sockets.append(near)
                self._begin(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        self._through.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self._port))
        except OSError:
            near.shutdown(socket.SHUT_RDWR)
            return
        self._sockets.append(far)
        self._begin(self._pump, near, far)
        self._begin(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._through.wait()
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


NETWORKS: dict[str, type[Network]] = {"unplugged": Unplugged, "swallowed": Swallowed, "proxy": Proxy}
