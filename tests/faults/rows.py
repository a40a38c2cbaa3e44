"""The table of faults: what is done, what a client is told, and what is lost.

`told` are the codes that a client may see; at least one of them is seen in every try. Where it is empty nobody is there
to be told. `faults.report` makes docs/reliability.md of this and of tests/faults/results.json.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One fault."""

    fault: str
    made: str
    """What the tests do."""
    told: tuple[str, ...]
    promise: str
    """What holds then."""
    lost: str = "nothing"


_REFUSED = "nothing: it was never let in"

ROWS: dict[int, Row] = {
    1: Row(
        "kill -9 before a checkpoint's rename",
        "a failpoint kills the server after the files are synced, in the step of a client",
        ("UNAVAILABLE",),
        "the previous checkpoint is loaded, bit for bit, and the leftover is swept",
        "the step, which was not answered: its gradients are made again",
    ),
    2: Row(
        "kill -9 after the rename, before the registry's commit",
        "a failpoint kills the server between the two",
        ("UNAVAILABLE",),
        "a directory that the registry does not name is swept",
        "the step, which was not answered: its gradients are made again",
    ),
    3: Row(
        "kill -9 after the commit, before the reply",
        "a failpoint kills the server there; the call is repeated with its request_id",
        ("UNAVAILABLE",),
        "the repeated call gets the stored answer, and the change happened once",
    ),
    4: Row(
        "kill -9 in a stream",
        "the server is killed while a plain client, and onebase's own, read completions",
        ("UNAVAILABLE",),
        "drawn again with the same seed the completions are the same; onebase's client does so by itself",
        "what was streamed of the completions, until they are drawn again",
    ),
    5: Row(
        "client killed in a stream",
        "kill -9 to a process that reads completions",
        (),
        "its work ends within one engine step, and its place in the key-value cache is free",
    ),
    6: Row(
        "client frozen, or its network pulled",
        "SIGSTOP to a process that reads; and a network that swallows packets under a training",
        ("UNAVAILABLE",),
        "noticed within 8 seconds (a ping after 5, and 3 for its answer), its work ended and its cache freed; a "
        "training goes on when the network is back",
    ),
    7: Row(
        "deadline passes in the queue",
        "a pass of training with a short deadline behind a long one",
        ("DEADLINE_EXCEEDED",),
        "it is never executed: no gradient waits afterwards",
    ),
    8: Row(
        "deadline passes in OptimStep",
        "deadlines from a tenth to twice of the time that such a step takes",
        ("DEADLINE_EXCEEDED",),
        "the step is made once or not at all, and the repeated request_id says which and brings it about",
    ),
    9: Row("cancel", "a client cancels a stream", ("CANCELLED",), "work stops at the next engine step"),
    10: Row(
        "queue full",
        "a tenant fills what it may have queued",
        ("RESOURCE_EXHAUSTED",),
        "RetryInfo says when to come again, and then there is room",
        _REFUSED,
    ),
    11: Row(
        "one tenant floods",
        "one tenant sends many times what it may, another works beside it",
        ("RESOURCE_EXHAUSTED",),
        "only the one that floods is refused; the other keeps its share of the device",
        _REFUSED,
    ),
    12: Row(
        "malformed proto bytes",
        "bytes that are no message, to every method that reflection lists",
        ("INVALID_ARGUMENT",),
        "the server lives",
        _REFUSED,
    ),
    13: Row("message over the limit", "65 MiB to a limit of 64", ("RESOURCE_EXHAUSTED",), "the server lives", _REFUSED),
    14: Row(
        "gzip bomb",
        "512 MiB of zeros, compressed to half a MiB",
        ("RESOURCE_EXHAUSTED",),
        "the server's memory, watched meanwhile, stays flat",
        _REFUSED,
    ),
    15: Row(
        "NaN or Inf in advantages, logprobs, learning rate",
        "NaN, Inf and -Inf in each",
        ("INVALID_ARGUMENT",),
        "BadRequest names the field; weights and gradients are as they were",
        _REFUSED,
    ),
    16: Row(
        "NaN loss or gradient",
        "old logprobs so small that the ratio overflows; weights whose products overflow, beside another tenant",
        ("FAILED_PRECONDITION",),
        "the pass is skipped, weights are bit-identical, no other tenant sees anything of it, and the gradients of "
        "good passes are still there; where their sum or its square overflows, the step is skipped",
        "the bad pass; gradients whose sum overflows",
    ),
    17: Row(
        "shape, dtype or byte length wrong",
        "tensors that contradict themselves",
        ("INVALID_ARGUMENT",),
        "BadRequest names the field",
        _REFUSED,
    ),
    18: Row(
        "token id negative or not in the vocabulary",
        "in prompts and completions",
        ("INVALID_ARGUMENT",),
        "BadRequest names the field",
        _REFUSED,
    ),
    19: Row(
        "context too long, max_new_tokens absurd",
        "lengths up to 2³¹-1",
        ("INVALID_ARGUMENT",),
        "BadRequest names the field",
        _REFUSED,
    ),
    20: Row(
        "adapter name that is a path or a trick",
        "`../x`, NUL, slashes, look-alike letters, to every method that takes a name",
        ("INVALID_ARGUMENT",),
        "no file is made; paths on disk never come from names",
        _REFUSED,
    ),
    21: Row(
        "symlink or path escape in an upload or a load",
        "paths and file names that lead outside, symlinked directories and files",
        ("INVALID_ARGUMENT", "PERMISSION_DENIED"),
        "nothing is read or written outside the roots: all that lies around them is hashed before and after",
        _REFUSED,
    ),
    22: Row(
        "pickle adapter (.bin)",
        "a pickle that makes a file when it is opened, loaded and uploaded",
        ("INVALID_ARGUMENT",),
        "it is never opened",
        _REFUSED,
    ),
    23: Row(
        "broken safetensors",
        "huge headers, overlapping offsets, files cut off, and eight more",
        ("INVALID_ARGUMENT",),
        "no adapter is made, and a whole file is taken next",
        _REFUSED,
    ),
    24: Row(
        "rank or parameter bomb",
        "ranks up to 2³¹-1, and more adapters than a tenant's bytes",
        ("RESOURCE_EXHAUSTED",),
        "refused before anything is allocated; memory stays flat",
        _REFUSED,
    ),
    25: Row(
        "missing or bad token",
        "no token and a guessed one, to every method that reflection lists",
        ("UNAUTHENTICATED",),
        "only health answers, as docs/security.md says",
        _REFUSED,
    ),
    26: Row(
        "another tenant's adapter",
        "another tenant's adapter and session, by name and id, in every method that takes one",
        ("NOT_FOUND",),
        "word for word the answer for a name that nobody has",
        _REFUSED,
    ),
    27: Row(
        "valid token, scope missing",
        "a token with one scope, to methods of the others",
        ("PERMISSION_DENIED",),
        "the message names the scope",
        _REFUSED,
    ),
    28: Row(
        "disk full",
        "a tmpfs of 2 MiB that is filled while steps are made",
        ("RESOURCE_EXHAUSTED",),
        "the old checkpoint is intact, serving goes on, and the repeated step becomes durable when there is room",
    ),
    29: Row(
        "checkpoint's hash does not match",
        "a bit is flipped in a checkpoint of a killed server",
        ("DATA_LOSS",),
        "the checkpoint before it is offered (`--restore`), and other adapters are served",
        "the damaged checkpoint's steps",
    ),
    30: Row(
        "out of memory in one batch",
        "the allocator refuses what a step asks for",
        ("RESOURCE_EXHAUSTED",),
        "the job that asked too much fails, the others of its batch are done",
        "the job that asked too much",
    ),
    31: Row(
        "slow consumer of a stream",
        "a client that stops to read",
        ("RESOURCE_EXHAUSTED",),
        "memory is bounded, and after the idle limit its work ends",
        "the rest of the stream",
    ),
    32: Row(
        "a writer with a stale lease or version",
        "a session without the lease, one whose ttl ran out meanwhile, and one that expects an older version",
        ("ABORTED",),
        "the holder's weights are as they were",
        _REFUSED,
    ),
    33: Row(
        "OptimStep without gradients",
        "a step after a step, and after a restart",
        ("FAILED_PRECONDITION",),
        "the version does not grow",
        _REFUSED,
    ),
    34: Row(
        "duplicate create",
        "the same name again, also after a restart",
        ("ALREADY_EXISTS",),
        "the first adapter is as it was",
        _REFUSED,
    ),
    35: Row(
        "drain (SIGTERM)",
        "SIGTERM while completions run and steps are not saved",
        ("UNAVAILABLE",),
        "new calls are refused, work in flight finishes, state is saved, the exit code is 0",
    ),
    36: Row(
        "a bug in a handler",
        "exceptions with a secret in their text, in calls and in streams",
        ("INTERNAL",),
        "the message holds an opaque id, under which the log has the story",
        "the call",
    ),
}
