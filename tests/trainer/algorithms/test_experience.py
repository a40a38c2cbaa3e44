"""How a batch is put together."""

import numpy as np
import pytest

from onebase.client import types as t
from onebase.trainer.algorithms.experience import numbers_of, read_experience


def completion(logprobs):
    return t.Completion(
        prompt_index=0,
        completion_index=0,
        text="",
        tokens=np.zeros(2, np.int32),
        logprobs=logprobs,
        values=None,
        finish_reason="eos",
        adapter=t.AdapterVersion("p", 3),
        seed=0,
        prompt_tokens=1,
    )


def test_rows_are_padded_with_zeros_and_what_is_padded_does_not_count():
    numbers = {"logprobs": [np.array([-1.0, -2.0]), np.array([-3.0])]}
    batch = read_experience(["a", "b"], [[5, 6], [7]], [1, 2], numbers, query_lengths=[1, 1], version=3)
    assert batch.logprobs.tolist() == [[-1.0, -2.0], [-3.0, 0.0]]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.row(batch.logprobs, 1).tolist() == [-3.0]
    assert batch.row_mask(1).tolist() == [True]
    assert batch.reference_logprobs is None
    assert batch.values is None


def test_a_mask_leaves_tokens_out():
    numbers = {"logprobs": [np.array([-1.0, -2.0]), np.array([-3.0])]}
    batch = read_experience(["a", "b"], [[5, 6], [7]], [1, 2], numbers, [[0, 1], [1]], query_lengths=[1, 1], version=3)
    assert batch.mask.tolist() == [[False, True], [True, False]]
    assert batch.lengths.tolist() == [1, 1]


def test_what_was_not_asked_for_is_named():
    assert numbers_of([completion(np.ones(2, np.float32))], ["logprobs"])["logprobs"][0].tolist() == [1, 1]
    with pytest.raises(ValueError, match="an answer lacks values; ask for it"):
        numbers_of([completion(None)], ["values"])
