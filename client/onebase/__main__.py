"""Where the `onebase` command begins: what must be said before gRPC is imported, which reads it only then."""

from __future__ import annotations

import os


def main() -> None:
    """Runs the command line, without the log of gRPC's core, unless GRPC_VERBOSITY asks for it: it names no flag."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from onebase.client.cli import main

    main()


if __name__ == "__main__":
    main()
