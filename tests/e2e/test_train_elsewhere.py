"""A trainer that trains elsewhere and samples here: processes of their own, which share no directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e.conftest import FIXTURES
from oracle.fixtures import PEFT_WARNINGS, assert_close, assert_rows_close, of_completions, sequences
from peft import PeftModel
from safetensors.numpy import load_file
from support import RunningServer, environment, start_server
from transformers import AutoModelForCausalLM

from onebase.client import SamplingParams, connect

pytestmark = [pytest.mark.e2e, PEFT_WARNINGS]

SCRIPT = Path(__file__).parents[2] / "examples" / "train_elsewhere" / "train.py"
STEPS = 4


def trainer(server: RunningServer, base: str, name: str, output: Path, like: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(FIXTURES / base), "--server", server.address, "--name", name]
    command += ["--prompt", "w5 w6", "--prompt", "w40 w7", "--like", like, "--steps", str(STEPS), "--n", "8"]
    command += ["--learning-rate", "0.01", "--output", str(output)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines()]


@torch.no_grad()
def own_logprobs(model: torch.nn.Module, base: str) -> list[Any]:
    rows = []
    for one in sequences(base):
        ids = torch.tensor([[*one.prompt, *one.completion]])
        distribution = torch.log_softmax(model.eval()(input_ids=ids).logits[0, :-1], dim=-1)
        rows.append(distribution.gather(1, ids[0, 1:, None])[:, 0].numpy())
    return of_completions(base, rows)


@pytest.mark.parametrize(("base", "likes"), [("base", {"up": "5", "down": "7"}), ("base_gpt2", {"up": "5"})])
def test_trainers_elsewhere_push_each_step_and_sample_what_they_pushed(
    tmp_path: Path, base: str, likes: dict[str, str]
) -> None:
    with start_server(FIXTURES / base, "--threads", "1", "--root", str(tmp_path / "root")) as server:
        processes = {n: trainer(server, base, n, tmp_path / n, like) for n, like in likes.items()}
        for process in processes.values():
            found = steps(process)
            assert [step["version"] for step in found] == list(range(STEPS))
            assert max(step["difference"] for step in found) < 1e-5
        with connect(server.address) as client:
            for name in processes:
                adapter = client.adapter(name)
                assert (adapter.version, adapter.source, adapter.leased) == (STEPS, "uploaded", False)
                sampled = client.generate([[5, 6]], adapter=name, sampling=SamplingParams(max_new_tokens=4))
                assert sampled[0].adapter.version == STEPS

                plain = AutoModelForCausalLM.from_pretrained(FIXTURES / base)
                model = PeftModel.from_pretrained(plain, tmp_path / name)
                served = [one.logprobs for one in client.logprob(sequences(base), adapter=name)]
                assert_rows_close(served, own_logprobs(model, base), "logprobs of the last push")
                of_base = [one.logprobs for one in client.logprob(sequences(base), adapter="base")]
                assert max(np.abs(a - b).max() for a, b in zip(served, of_base, strict=True)) > 1e-2

                got = Path(client.download_adapter(name, tmp_path / "got" / name).path)
                trained = load_file(tmp_path / name / "adapter_model.safetensors")
                fetched = load_file(got / "adapter_model.safetensors")
                assert sorted(fetched) == sorted(trained)
                assert all(np.array_equal(fetched[key], tensor) for key, tensor in trained.items())

                merged = client.save_adapter(name, f"merged/{name}", merged=True)
                alone = AutoModelForCausalLM.from_pretrained(merged.path)
                assert_close(
                    np.concatenate(own_logprobs(alone, base)), np.concatenate(served), "logprobs of the merged model"
                )


def test_moments_and_version_come_back_from_another_machine(tmp_path: Path) -> None:
    """What is downloaded with its moments and uploaded again goes on as if it had never been away."""
    from e2e.test_isolation import batch

    from onebase.client import AdamW

    flags = ("--policy", f"p={FIXTURES / 'policy'}", "--policy", f"q={FIXTURES / 'policy'}", "--threads", "1")
    with start_server(FIXTURES / "base", *flags) as server, connect(server.address) as client:
        with client.open_session("p") as session:
            for _ in range(2):
                session.forward_backward(batch())
                session.optim_step(AdamW(1e-2))
            session.download_adapter("p", tmp_path / "p", with_optimizer=True)
            session.forward_backward(batch())
            session.optim_step(AdamW(1e-2))
            undisturbed = session.logprob(sequences("base"))
        with client.open_session("q") as session:
            back = session.upload_adapter("q", tmp_path / "p", replace=True, with_optimizer=True)
            assert back.version == 2
            session.forward_backward(batch())
            session.optim_step(AdamW(1e-2))
            resumed = session.logprob(sequences("base"))
    for one, other in zip(undisturbed, resumed, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        assert one.adapter.version == other.adapter.version == 3
