"""What can go wrong, in the server's own words.

    OnebaseError
    ├── InvalidArgument      the request itself is wrong
    ├── NotFound             no such adapter, session or file
    │   └── Gone             an adapter was replaced or deleted between the look at its name and the work
    ├── AlreadyExists        the name or path is taken
    ├── Unauthenticated      the server wants to know who calls
    ├── PermissionDenied     another's adapter, a scope the token lacks, a path outside the roots
    ├── FailedPrecondition   the request is fine, the state is not
    ├── Aborted              a version or a lease moved on
    ├── ResourceExhausted    a queue or a limit is full
    ├── DeadlineExceeded     the client's deadline passed
    ├── Cancelled            the client went away
    ├── Unavailable          the server drains
    ├── Unimplemented        the method is not there, though its service is
    ├── DataLoss             a file is not what its hash says
    └── Internal             a bug; the message shown is an opaque id

These classes know nothing of gRPC: `status` gives each its code, in one total table.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onebase.server.identity import Caller


_LONGEST_MESSAGE, _LONGEST_FIELD = 1200, 200
"""Bytes in UTF-8. A client takes 8 KiB of a status, in which a message is told three times, once with each byte that is
no ASCII as three characters; over that it is told another code, and nothing of this."""


class OnebaseError(Exception):
    """An error to be told to a client.

    Args:
        reason: UPPER_SNAKE, stable, for programs.
        message: for people: what is wrong, with the value, and the way out; of one that is too long the middle is left
            out.
        field: path of the request's field that is to blame, as the proto names it ("sequences[3].prompt"), or "".
        retry_after: seconds after which a retry may succeed, or None.
    """

    def __init__(self, reason: str, message: str, *, field: str = "", retry_after: float | None = None) -> None:
        self.reason = reason
        self.message = _cut(message, _LONGEST_MESSAGE)
        self.field = _cut(field, _LONGEST_FIELD)
        super().__init__(self.message)
        self.retry_after = retry_after

    who: Caller | None = None
    """Who was turned away, where that is known although he is not let in."""

    def again(self) -> OnebaseError:
        """The same, to be raised once more: an exception takes the traceback of each raise along."""
        return type(self)(self.reason, self.message, field=self.field, retry_after=self.retry_after)


def _cut(text: str, longest: int) -> str:
    """A text of no more than so many bytes: its beginning, and its end, where messages say the way out."""
    if len(text) * 4 <= longest or len(data := text.encode("utf-8", "replace")) <= longest:
        return text
    end = longest // 3
    begin = longest - end - len("…".encode())
    return f"{data[:begin].decode(errors='ignore')}…{data[-end:].decode(errors='ignore')}"


class InvalidArgument(OnebaseError):
    """The request itself is wrong; sending it again cannot help."""


class NotFound(OnebaseError):
    """No such adapter, session or file."""


class Gone(NotFound):
    """An adapter was replaced or deleted between the look at its name and the work: look again."""


class AlreadyExists(OnebaseError):
    """The name or the path is taken."""


class Unauthenticated(OnebaseError):
    """The call has no token, or none that is known."""


class PermissionDenied(OnebaseError):
    """The thing is there, and this client may not do that with it."""


class FailedPrecondition(OnebaseError):
    """The request is fine, but the state it needs is not there."""


class Aborted(OnebaseError):
    """A version or a lease moved on; look again and repeat."""


class ResourceExhausted(OnebaseError):
    """A queue, a limit or the memory is full."""


class DeadlineExceeded(OnebaseError):
    """The client's deadline passed before the work was done."""


class Cancelled(OnebaseError):
    """The client cancelled, or its connection is gone."""


class Unavailable(OnebaseError):
    """The server does not take work now."""


class Unimplemented(OnebaseError):
    """A method that its service lists and does not have."""


class DataLoss(OnebaseError):
    """A file does not hold what its manifest says."""


class Internal(OnebaseError):
    """A bug. The message holds an id under which the log has the story."""


def drained() -> Unavailable:
    """What is told of work that the end of the server has cut off."""
    return Unavailable("DRAINED", "the server shut down before this was done: repeat it later", retry_after=5.0)


def not_there() -> Gone:
    """What is told of an adapter that has gone between the look at its name and the work."""
    return Gone("ADAPTER_NOT_FOUND", "the adapter was replaced or deleted just now: repeat the call")


def disk_full(error: OSError) -> OnebaseError:
    """What a failure to write means to a client: a full disk may pass, anything else is the operator's to mend."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            "DISK_FULL",
            "the server's disk is full: nothing that was durable is lost; free some room, and repeat the call",
            retry_after=5.0,
        )
    if error.errno == errno.EBUSY:
        return Unavailable(
            "STORE_BUSY",
            "another program holds the registry of the server's state: repeat the call; if it goes on, the operator "
            "should look who has registry.sqlite open",
            retry_after=2.0,
        )
    return Internal("DISK_FAILED", f"the server's disk cannot be written ({error.strerror}): its log has the story")
