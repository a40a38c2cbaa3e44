"""A thread that keeps a session alive, and tells the server that the session's client is there."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import grpc

from onebase.client.codec.rpc import Call
from onebase.client.errors import NotFoundError, OnebaseError, UnimplementedError, translate
from onebase.client.retry import Pauses
from onebase.client.transport import CLIENT_CLOSED, ServerStream, Transport


class KeepAlive:
    """Attends a session from a daemon thread, until the session ends or `stop` is called.

    A stream lives as long as this process does, and is opened again where it breaks. A server that knows no such
    streams has a method called over and over, until it returns False.

    The method's object is held weakly: when nobody else holds it any more, the thread ends, and so the lease of a
    session that was forgotten runs out.

    Args:
        transport: sends the call.
        attend: opens the stream.
        beat: the bound method that is called where there are no streams; returns whether to go on.
        interval: seconds from one call of it to the next, and the longest wait for another stream.
    """

    def __init__(self, transport: Transport, attend: Call[Any], beat: Callable[[], bool], interval: float) -> None:
        self._transport = transport
        self._attend = attend
        self._beat = weakref.WeakMethod(beat, self._forget)
        self._interval = interval
        self._stopped = threading.Event()
        self._forgotten = False
        self._stream: ServerStream[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="onebase-keepalive", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread is still there."""
        return self._thread.is_alive()

    def stop(self, wait: float) -> None:
        """Ends the thread; returns when it has ended, or after `wait` seconds if a call is under way."""
        self._stopped.set()
        self._hang_up()
        self._thread.join(wait)

    def _forget(self, _: object) -> None:
        # The collector may come while this very thread holds the event's lock, so the event is left alone.
        self._forgotten = True
        self._hang_up()

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def _ended(self) -> bool:
        return self._forgotten or self._stopped.is_set()

    def _run(self) -> None:
        pauses = Pauses(self._transport.backoff, self._interval)
        while not self._ended():
            try:
                self._listen(pauses)
            except NotFoundError:
                return
            except UnimplementedError:
                self._beat_on()
                return
            except OnebaseError as error:
                if error.reason == CLIENT_CLOSED:
                    return
                self._stopped.wait(pauses.after(error, random.random()))
            else:
                return

    def _listen(self, pauses: Pauses) -> None:
        """Returns when the server ends the stream, because the session has ended.

        Raises:
            OnebaseError: the stream broke.
        """
        self._stream = stream = self._transport.begin(self._attend, None)
        if self._ended():
            stream.cancel()
        try:
            for _ in stream:  # what it says may be older than the answers to calls, so only that it speaks counts
                pauses.heard()
        except grpc.RpcError as error:
            raise translate(error, self._attend.rpc.method) from None

    def _beat_on(self) -> None:
        while not self._stopped.wait(self._interval):
            beat = self._beat()
            if beat is None or not beat():
                return
            del beat
