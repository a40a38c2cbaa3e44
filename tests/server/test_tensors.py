from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from server.harness import floats, ids, mask

from onebase.server.codec.tensors import float_tensor, int_tensor, read_floats, read_mask, read_tokens
from onebase.server.errors import InvalidArgument
from onebase.v1 import types_pb2

T = types_pb2.Tensor


@given(hnp.arrays(np.int64, st.integers(0, 50), elements=st.integers(0, 999)), st.booleans())
def test_tokens_come_back_as_they_went(tokens, wide):
    tensor = ids(*tokens, dtype=types_pb2.DTYPE_INT64) if wide else int_tensor(tokens)
    read = read_tokens(tensor, "x", 1000)
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, tokens)


@given(hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_floats_come_back_bit_by_bit_in_memory_of_their_own(numbers):
    read = read_floats(float_tensor(numbers), "x", len(numbers))
    assert read.tobytes() == numbers.tobytes()
    assert read.flags.writeable


def test_a_float_tensor_keeps_its_shape_and_little_endian_order():
    tensor = float_tensor(np.arange(6, dtype=">f4").reshape(2, 3))
    assert list(tensor.shape) == [2, 3]
    np.testing.assert_array_equal(np.frombuffer(tensor.data, "<f4"), np.arange(6))


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ((0, 999), None),
        ((5, -1, 7), "id -1 at index 1"),
        ((1, 2, 1000), "id 1000 at index 2"),
        ((2**31 - 1,), "id 2147483647"),
    ],
)
def test_ids_are_rows_of_the_embedding(tokens, told):
    if told is None:
        assert read_tokens(ids(*tokens), "x", 1000).tolist() == list(tokens)
        return
    with pytest.raises(InvalidArgument, match=told) as caught:
        read_tokens(ids(*tokens), "a.b", 1000)
    assert (caught.value.field, caught.value.reason) == ("a.b", "BAD_TOKEN_ID")


def test_ids_beyond_32_bits_are_not_cut():
    with pytest.raises(InvalidArgument, match=str(2**32)):
        read_tokens(ids(2**32, dtype=types_pb2.DTYPE_INT64), "x", 1000)


@pytest.mark.parametrize(
    "tensor",
    [
        T(),
        T(dtype=types_pb2.DTYPE_FLOAT32, shape=[1], data=b"\0\0\0\0"),
        T(dtype=types_pb2.DTYPE_BOOL, shape=[1], data=b"\1"),
        T(dtype=99, shape=[1], data=b"\0\0\0\0"),
        T(dtype=types_pb2.DTYPE_INT32, data=b"\0\0\0\0"),
        T(dtype=types_pb2.DTYPE_INT32, shape=[1, 1], data=b"\0\0\0\0"),
        T(dtype=types_pb2.DTYPE_INT32, shape=[-1], data=b""),
        T(dtype=types_pb2.DTYPE_INT32, shape=[2], data=b"\0\0\0\0"),
        T(dtype=types_pb2.DTYPE_INT32, shape=[1], data=b"\0\0\0"),
        T(dtype=types_pb2.DTYPE_INT64, shape=[1], data=b"\0\0\0\0"),
        T(dtype=types_pb2.DTYPE_INT32, shape=[2**62], data=b""),
    ],
    ids=lambda tensor: str(tensor).replace("\n", " "),
)
def test_what_contradicts_itself_is_refused(tensor):
    with pytest.raises(InvalidArgument) as caught:
        read_tokens(tensor, "sequences[0].prompt.tokens", 1000)
    assert (caught.value.field, caught.value.reason) == ("sequences[0].prompt.tokens", "BAD_TENSOR")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_told_by_its_index(bad):
    with pytest.raises(InvalidArgument, match="at index 2") as caught:
        read_floats(floats(0, 1, bad), "sequences[1].advantages", 3)
    assert (caught.value.field, caught.value.reason) == ("sequences[1].advantages", "NOT_FINITE")


def test_lengths_must_be_the_completions():
    with pytest.raises(InvalidArgument, match="2 entries, and its completion has 3 tokens") as caught:
        read_floats(floats(0, 1), "x", 3)
    assert caught.value.reason == "LENGTH_MISMATCH"


def test_double_precision_is_refused_rather_than_rounded():
    with pytest.raises(InvalidArgument, match="DTYPE_FLOAT64: use DTYPE_FLOAT32"):
        read_floats(T(dtype=types_pb2.DTYPE_FLOAT64, shape=[1], data=bytes(8)), "x", 1)


def test_masks():
    read = read_mask(mask(0, 1, 1), "x", 3)
    assert read.dtype == np.bool_
    assert read.tolist() == [False, True, True]
    for tensor, reason in ((mask(0, 2, 1), "BAD_TENSOR"), (mask(0, 0, 0), "EMPTY_MASK"), (mask(1), "LENGTH_MISMATCH")):
        with pytest.raises(InvalidArgument) as caught:
            read_mask(tensor, "x", 3)
        assert caught.value.reason == reason
