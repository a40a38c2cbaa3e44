"""Trainers that come and go, as threads with a channel each: no name, session or request_id is ever used twice.

One comes, makes an adapter, trains, samples and scores it, and goes: in order, or without a word, so that its session
must run out by itself and the next one clears its adapter away.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from history.calls import Stubs, refusal, request_of, send

from onebase.v1 import adapters_pb2, sessions_pb2

_TTL = 5.0
_TIMEOUT = 60.0
_EXPECTED = frozenset({"CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "PERMISSION_DENIED"})
"""What a client of a busy server may be told: it gave up itself, or another is quicker."""


class Load:
    """So many trainers at once, and as many who only ask.

    Args:
        address: of the server.
        tokens: of the tenants, who take turns.
        trainers: how many at once.
        seed: of what they do.
    """

    def __init__(self, address: str, tokens: list[str], trainers: int, seed: int) -> None:
        self.done: Counter[str] = Counter()
        """Answered calls by kind, and refusals by code."""
        self.wrong: list[str] = []
        """Errors that are no declared refusal."""
        self._address = address
        self._tokens = tokens
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._left: list[tuple[float, str, str]] = []  # when its session is over, token, adapter
        roles = (self._trainer, self._asker)
        self._threads = [
            threading.Thread(target=self._play, args=(role, f"{seed}/{role.__name__}/{number}"), daemon=True)
            for number in range(trainers)
            for role in roles
        ]

    def fill(self, passes: int) -> None:
        """Has each tenant ask for so many passes, of whose answers a server keeps a number; raises what is refused."""
        shares = [(token, share) for token in self._tokens for share in (passes // 2, passes - passes // 2)]
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(lambda one: self._pass(*one), shares))
        self.done.clear()

    def _pass(self, token: str, passes: int) -> None:
        stubs = Stubs(self._address, token)
        opened = stubs.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=60), metadata=stubs.metadata)
        session, name = opened.session_id, f"t{random.randbytes(6).hex()}"
        self._ask(stubs, "create", session, name=name, rank=4, seed=0)
        for number in range(passes):
            rows = [(number + row) % 12 for row in range(4)]
            self._ask(stubs, "pass", session, name=name, rows=rows, loss=("value", "cross_entropy")[number % 2])
        self._ask(stubs, "delete", session, name=name)
        self._ask(stubs, "close", session)
        stubs.channel.close()

    def start(self) -> None:
        """Begins."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends, and clears away what was left."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_TIMEOUT)
        if self._left:
            time.sleep(max(0.0, max(when for when, _, _ in self._left) - time.monotonic()))
        self._clear()

    def _play(self, role: Callable[[random.Random, Stubs, str], None], seed: str) -> None:
        dice, number = random.Random(seed), 0
        while not self._stop.is_set():
            number += 1
            token = dice.choice(self._tokens)
            stubs = Stubs(self._address, token)
            try:
                role(dice, stubs, token)
            except grpc.RpcError as error:
                self._refused(error)
            finally:
                stubs.channel.close()
            self._clear()

    def _refused(self, error: grpc.RpcError) -> None:
        code, reason = refusal(error)
        with self._lock:
            self.done[code] += 1
            if code not in _EXPECTED:
                self.wrong.append(f"{code} {reason}: {error.details()}")

    def _ask(self, stubs: Stubs, kind: str, session: str = "", cancel: float | None = None, **args: Any) -> list[Any]:
        request = request_of(kind, args)
        fields = request.DESCRIPTOR.fields_by_name
        if session and "session_id" in fields:
            request.session_id = session
        if session and "request_id" in fields:
            request.request_id = random.randbytes(8).hex()
        answer = send(stubs, kind, request, _TIMEOUT, cancel)
        with self._lock:
            self.done[kind] += 1
        return answer

    # ------------------------------------------------------------------------------------------------------------ roles

    def _trainer(self, dice: random.Random, stubs: Stubs, token: str) -> None:
        opened = stubs.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=_TTL), metadata=stubs.metadata)
        session, name = opened.session_id, f"t{dice.randbytes(6).hex()}"
        self._ask(stubs, "create", session, name=name, rank=dice.choice((4, 8, 16)), seed=dice.randrange(99))
        vanishes = dice.random() < 0.3
        try:
            for _ in range(dice.randint(2, 8)):
                rows = [dice.randrange(12) for _ in range(4)]
                cut = 0.03 if vanishes and dice.random() < 0.3 else None
                self._sample(stubs, session, name, dice.randrange(2**31), cut)
                self._ask(stubs, "score", session, name=name, rows=rows)
                self._ask(stubs, "pass", session, name=name, rows=rows, loss=dice.choice(("value", "cross_entropy")))
                self._ask(stubs, "step", session, name=name, rate=0.001)
            self._ask(stubs, "download", name=name)
        finally:
            with self._lock:
                self._left.append((time.monotonic() + _TTL + 2.0, token, name))
        if not vanishes:
            self._ask(stubs, "delete", session, name=name)
            self._ask(stubs, "close", session)
            with self._lock:
                self._left = [one for one in self._left if one[2] != name]

    def _sample(self, stubs: Stubs, session: str, name: str, seed: int, cut: float | None) -> None:
        try:
            self._ask(stubs, "generate", session, cut, name=name, rows=[0, 1], seed=seed, tokens=24)
        except grpc.RpcError as error:
            if cut is None or error.code() is not grpc.StatusCode.CANCELLED:
                raise

    def _asker(self, dice: random.Random, stubs: Stubs, _token: str) -> None:
        for _ in range(dice.randint(5, 30)):
            self._ask(stubs, "reward", name="", rows=[dice.randrange(12) for _ in range(dice.randint(1, 8))])
            self._ask(stubs, "list")
            if self._stop.wait(dice.uniform(0, 0.1)):
                return

    def _clear(self) -> None:
        """Deletes what those left behind who went without a word."""
        now = time.monotonic()
        with self._lock:
            due = [one for one in self._left if one[0] <= now]
            self._left = [one for one in self._left if one[0] > now]
        for _, token, name in due:
            stubs = Stubs(self._address, token)
            try:
                stubs.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name), metadata=stubs.metadata)
            except grpc.RpcError as error:
                self._refused(error)
            finally:
                stubs.channel.close()
