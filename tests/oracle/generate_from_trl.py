"""examples/from_trl/ppo_trl.py, run unmodified with TRL 0.11.4: what its counterpart on a server has to give too."""

from __future__ import annotations

import random
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

from generate_models import FIRST_WORD, VOCABULARY
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "from_trl" / "ppo_trl.py"
STEPS, BATCH = 3, 8


def from_trl_oracle(base: str, policy: str, reward: str) -> None:
    """Writes `from_trl_prompts.txt` and `from_trl.json`, the script's own record."""
    generator = random.Random("from_trl")
    lines = (
        " ".join(f"w{generator.randrange(FIRST_WORD, VOCABULARY)}" for _ in range(generator.randint(2, 8)))
        for _ in range(STEPS * BATCH)
    )
    Path("from_trl_prompts.txt").write_text("".join(f"{line}\n" for line in lines))
    with tempfile.TemporaryDirectory() as folder:
        start = Path(shutil.copytree(policy, Path(folder) / "policy"))
        # where TRL looks for the value head of an adapter's directory
        save_file(load_file(start / "value_head.safetensors"), start / "model.safetensors", {"format": "pt"})
        given = {"--base": base, "--policy": start, "--reward": reward}
        given |= {"--prompts": "from_trl_prompts.txt", "--out": "from_trl.json"}
        arguments = [str(word) for pair in given.items() for word in pair]
        with mock.patch.object(sys, "argv", [str(SCRIPT), *arguments]):
            runpy.run_path(str(SCRIPT), run_name="__main__")
