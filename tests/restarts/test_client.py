"""The client lives through kill -9 and a restart of its server, and its user notices a pause."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from restarts.conftest import Start
from restarts.plain import Code, Plain, refused

from onebase.client import AdamW, CrossEntropyLoss, LoraSpec, SamplingParams, TrainingSequence, connect
from onebase.client.errors import FailedPreconditionError

pytestmark = pytest.mark.e2e
ROW = TrainingSequence(prompt=np.array([5, 6]), completion=np.array([7, 8, 9]))
LONG = SamplingParams(max_new_tokens=48, n=16, seed=3, ignore_eos=True)


@pytest.mark.fault(4, times=2)
def test_calls_under_way_a_session_and_its_lease_survive_a_restart(start: Start) -> None:
    """Fault 4: completions that were cut in the middle are drawn again, and are the same."""
    with start("--durability", "step") as server, connect(server.address) as client, ThreadPoolExecutor() as pool:
        session = client.open_session(ttl=3.0)  # shorter than the restart takes
        session.create_adapter("p", LoraSpec(rank=4, target_modules=("all-linear",)))
        session.set_active("p")
        session.forward_backward(ROW, CrossEntropyLoss(), expected_pending=0)
        session.optim_step(AdamW(learning_rate=0.01), expected_pending=1)
        wanted = session.generate(["w5 w6", "w7"], sampling=LONG)
        session.forward_backward(ROW, CrossEntropyLoss(), expected_pending=0)

        with Plain(server.address) as plain:  # which is told what onebase's own client keeps to itself
            stream = plain.generate("base", n=500)
            next(stream)
            under_way = pool.submit(session.generate, ["w5 w6", "w7"], sampling=LONG)
            time.sleep(0.1)
            os.kill(server.process.pid, signal.SIGKILL)
            assert refused(list, stream) == (Code.UNAVAILABLE, "")
        server.process.wait()
        assert not under_way.done()
        with start("--durability", "step"):
            found = under_way.result(120)
            assert [one.tokens.tolist() for one in found] == [one.tokens.tolist() for one in wanted]
            assert {one.adapter.version for one in found} == {1}
            for call in (
                lambda: session.forward_backward(ROW, CrossEntropyLoss(), expected_pending=1),
                lambda: session.optim_step(AdamW(learning_rate=0.01), expected_pending=1),
            ):
                with pytest.raises(FailedPreconditionError) as caught:
                    call()
                assert caught.value.reason == "GRADIENTS_LOST"
            time.sleep(4.0)  # longer than its ttl: the thread that keeps it alive did not give up
            assert session.refresh().leases == ("p",)
            assert session.ppo_adapter_name == "p"
