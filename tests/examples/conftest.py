"""The example's scripts are run from their own folder; here they are imported from it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sentiment"))
