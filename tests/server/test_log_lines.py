"""What clients write never looks like a record of the server's own."""

from __future__ import annotations

import io
import logging

from onebase.server.log_lines import OneLine

FORGED = "x\nERROR onebase: forged\r\x1b[31m\x85\u2028y"


def test_control_characters_are_spelled_out() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    log = logging.Logger("onebase.test")
    log.addHandler(handler)
    log.warning("the name is %s", FORGED)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue() == (
        "WARNING onebase.test: the name is x\\nERROR onebase: forged\\r\\x1b[31m\\x85\\u2028y\n"
    )
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("error %d", 1)
    lines = stream.getvalue().splitlines()[1:]
    assert lines[0] == "ERROR onebase.test: error 1"
    assert all(line.startswith("  ") for line in lines[1:])
    assert "\x1b" not in stream.getvalue()
