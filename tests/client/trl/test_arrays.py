"""Padded batches taken apart and put together again, with torch and without."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.client.trl import arrays
from onebase.client.trl.arrays import give, pad_rows, read_batch, to_numpy


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setattr(arrays, "torch", lambda: None)


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_rows_come_out_as_they_went_in_whatever_the_side_of_the_padding(rows, left):
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 7), np.zeros((len(rows), width), int)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left[index] else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    batch = read_batch(torch.tensor(ids), torch.tensor(mask))
    assert [row.tolist() for row in batch.rows] == rows
    back = batch.padded([row.astype(np.float32) for row in batch.rows])
    assert back.tolist() == (ids * mask).tolist()


def test_the_last_real_number_is_held_behind_a_row_and_nothing_in_front_of_it():
    mask = [[1, 1, 0, 0], [0, 0, 1, 1]]
    batch = read_batch(np.zeros((2, 4), int), mask)
    held = batch.padded([np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])], hold_last=True)
    assert held[..., 0].tolist() == [[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 3.0, 4.0]]


@pytest.mark.parametrize(
    ("mask", "said"),
    [([[1, 0, 1]], "a hole"), ([[0, 0, 0]], "every token"), ([[1, 1]], r"\[1, 2\]")],
)
def test_masks_that_mean_nothing_are_refused(mask, said):
    with pytest.raises(ValueError, match=said):
        read_batch([[1, 2, 3]], mask)


def test_a_batch_has_two_dimensions():
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        read_batch(np.zeros((1, 2, 3), int))


def test_tensors_are_given_where_torch_is_and_arrays_where_it_is_not(without_torch):
    assert isinstance(give(np.zeros(2), None), np.ndarray)
    assert isinstance(arrays.draw_seed(), int)


def test_a_tensor_is_given_where_torch_is():
    given = give(np.arange(3.0), torch.zeros(1))
    assert isinstance(given, torch.Tensor)
    assert given.tolist() == [0.0, 1.0, 2.0]


def test_the_global_random_state_decides_the_seed():
    torch.manual_seed(5)
    first = arrays.draw_seed()
    assert arrays.draw_seed() != first
    torch.manual_seed(5)
    assert arrays.draw_seed() == first


def test_bfloat16_and_gradients_are_no_obstacle():
    assert to_numpy(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).tolist() == [1.0, 1.0]


def test_rows_are_padded_on_the_right():
    assert pad_rows([np.array([1, 2, 3]), np.array([4])], 9, None).tolist() == [[1, 2, 3], [4, 9, 9]]
