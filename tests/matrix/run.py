"""Runs the matrix and writes what came of it: `make matrix`, or `python -m matrix.run` from `tests`."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

from matrix import compare, report
from matrix.cases import CASES
from transformers.utils import logging as transformers_logging


def main() -> None:
    """Every case, untied and tied."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    entries = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as untied, tempfile.TemporaryDirectory() as tied:
            outcomes = compare.run(name, Path(untied), tied=False), compare.run(name, Path(tied), tied=True)
        entries[name] = one = report.entry(*outcomes)
        print(f"{name}: {one['status']}", one.get("reason") or one["largest_difference"], flush=True)
    report.write(report.record(entries))


if __name__ == "__main__":
    main()
