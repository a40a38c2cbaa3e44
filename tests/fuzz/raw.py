"""Bytes on the server's port that are no call: garbage, HTTP/2 that breaks its rules, connections left half-way."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from random import Random

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
_READ_SECONDS = 0.2


def garbage(random: Random) -> bytes:
    """What one connection sends."""
    match random.randrange(6):
        case 0:
            return random.randbytes(random.randint(0, 512))
        case 1:
            line = random.choice(
                [b"GET / HTTP/1.1\r\n", b"CONNECT x:1 HTTP/1.1\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03"]
            )
            return line + random.randbytes(random.randint(0, 64)) + random.choice([b"", b"\r\n\r\n"])
        case 2:
            return PREFACE[: random.randrange(len(PREFACE))]
        case 3:
            return PREFACE + random.randbytes(random.randint(0, 512))
        case _:
            return PREFACE + _SETTINGS + b"".join(_frame(random) for _ in range(random.randint(1, 12)))


def _frame(random: Random) -> bytes:
    """A frame of some type, on some stream, whose length may lie."""
    payload = random.randbytes(random.choice([0, 1, 4, 5, 6, 8, 32, 200]))
    length = len(payload) if random.random() < 0.7 else random.choice([0, 2**14, 2**24 - 1])
    stream = random.choice([0, 1, 1, 3, 2, 2**31 - 1, 2**32 - 1])
    return (
        struct.pack(">I", length)[1:]
        + bytes([random.randrange(12), random.randrange(256)])
        + struct.pack(">I", stream)
        + payload
    )


async def throw(address: str, random: Random) -> None:
    """Sends garbage over a connection of its own, and hangs up; sometimes it reads a little first."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError, TimeoutError):
        try:
            writer.write(garbage(random))
            await writer.drain()
            if random.random() < 0.2:
                async with asyncio.timeout(_READ_SECONDS):
                    await reader.read(4096)
        finally:
            writer.close()
