import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onebase.client.codec import values
from onebase.client.errors import InternalError
from onebase.client.types import LoraSpec, Sequence
from onebase.v1 import types_pb2 as pb

INT32 = st.integers(-(2**31), 2**31 - 1)
INTEGERS = st.sampled_from(["i1", "i2", "<i4", ">i4", "i8", "u1", "u2"])

# ------------------------------------------------------------------------------------------------ round trips


@given(st.lists(INT32, max_size=20))
def test_token_ids_pass_unchanged(ids):
    tensor = values.encode_tokens(ids, "tokens")
    array = values.decode_array(tensor, np.int32)

    assert tensor.dtype == pb.DTYPE_INT32
    assert tensor.data == b"".join(i.to_bytes(4, "little", signed=True) for i in ids)
    assert array.dtype == np.int32
    assert array.tolist() == ids


@given(INTEGERS.flatmap(lambda dtype: hnp.arrays(dtype, st.integers(0, 20), elements=st.integers(0, 127))))
def test_token_ids_of_every_integer_dtype_pass(array):
    assert values.decode_array(values.encode_tokens(array, "tokens"), np.int32).tolist() == array.tolist()


@given(hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)))
def test_floats_pass_bit_for_bit(array):
    assert values.decode_array(values.encode_floats(array, "x"), np.float32).tobytes() == array.tobytes()


@given(hnp.arrays(np.bool_, st.integers(0, 20)))
def test_masks_pass(mask):
    tensor = values.encode_mask(mask, "mask")

    assert tensor.dtype == pb.DTYPE_BOOL
    assert values.decode_array(tensor, np.bool_).tolist() == mask.tolist()


@given(hnp.arrays(np.float64, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0), elements=st.floats(-1e6, 1e6)))
def test_a_tensor_of_any_shape_is_read_in_the_dtype_that_was_asked_for(array):
    tensor = pb.Tensor(dtype=pb.DTYPE_FLOAT64, shape=array.shape, data=array.astype("<f8").tobytes())

    read = values.decode_array(tensor, np.float32)

    assert (read.dtype, read.shape) == (np.float32, array.shape)
    np.testing.assert_array_equal(read, array.astype(np.float32))


def test_views_of_arrays_are_encoded_in_their_own_order():
    tokens = np.arange(10)[::-3]

    assert values.decode_array(values.encode_tokens(tokens, "tokens"), np.int32).tolist() == [9, 6, 3, 0]


def test_what_is_read_cannot_be_written():
    array = values.decode_array(values.encode_floats([1.0, 2.0], "x"), np.float32)

    with pytest.raises(ValueError, match="read-only"):
        array[0] = 3.0


def test_numbers_beyond_float32_are_left_for_the_server_to_refuse():
    array = values.decode_array(values.encode_floats([1e300, float("nan")], "x"), np.float32)

    assert np.isposinf(array[0])
    assert np.isnan(array[1])


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("tokens", [[1.0, 2.0], [1, 2.5], [True, False], ["1"], [None], np.ones(3), [1, None]])
def test_token_ids_must_be_integers(tokens):
    with pytest.raises(TypeError, match=r"sequences\[3\]\.prompt must hold integer token ids"):
        values.encode_tokens(tokens, "sequences[3].prompt")


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 2**64])
def test_token_ids_must_fit(token):
    with pytest.raises(ValueError, match=r"prompt has ids .*fit in 32 bits"):
        values.encode_tokens([1, token], "prompt")


@pytest.mark.parametrize("tokens", [[[1, 2], [3, 4]], np.zeros((1, 0), int), np.int64(3), [[1], [2, 3]]])
def test_token_ids_have_one_dimension(tokens):
    with pytest.raises(ValueError, match=r"prompt must .*one.dimension"):
        values.encode_tokens(tokens, "prompt")


@pytest.mark.parametrize("numbers", [["a"], [1j], [None], [True]])
def test_numbers_must_be_real(numbers):
    with pytest.raises(TypeError, match="advantages must hold real numbers"):
        values.encode_floats(numbers, "advantages")


@pytest.mark.parametrize("mask", [[1, 0], [0.5], np.ones(2)])
def test_a_mask_must_be_boolean(mask):
    with pytest.raises(TypeError, match="mask must be boolean"):
        values.encode_mask(mask, "mask")


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2], data=b"\0" * 4),
        pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[-1, -1], data=b"\0" * 4),
        pb.Tensor(dtype=pb.DTYPE_UNSPECIFIED, shape=[1], data=b"\0" * 4),
        pb.Tensor(dtype=99, shape=[1], data=b"\0" * 4),
    ],
)
def test_a_tensor_that_contradicts_itself_is_the_servers_fault(tensor):
    with pytest.raises(InternalError, match="the server answered with"):
        values.decode_array(tensor, np.float32)


# ------------------------------------------------------------------------------------------ texts and sequences


@given(st.text())
def test_texts_pass_unchanged(text):
    if any("\ud800" <= character <= "\udfff" for character in text):
        return
    content = values.encode_content(text, "prompt")

    assert content.WhichOneof("value") == "text"
    assert content.text == text


def test_half_a_character_is_refused_by_name():
    with pytest.raises(ValueError, match=r"sequences\[0\]\.completion\.text="):
        values.encode_sequences(Sequence("p", "\ud800"))


@pytest.mark.parametrize("content", [b"bytes", 3, None, {1: 2}, iter([1])])
def test_other_contents_are_refused_by_name(content):
    with pytest.raises(TypeError, match=r"sequences\[1\]\.prompt must be text or token ids, not "):
        values.encode_sequences([Sequence("p", "c"), Sequence(content, "c")])


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        (np.array([1, 2, 3]), [[1, 2, 3]]),
        ([np.int64(1), 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (["a", [1, 2]], ["a", [1, 2]]),
        ((), []),
    ],
)
def test_one_prompt_or_several(prompts, expected):
    encoded = values.encode_prompts(prompts)

    read = [p.text if p.HasField("text") else values.decode_array(p.tokens, np.int32).tolist() for p in encoded]
    assert read == expected


def test_one_sequence_or_several():
    sequence = Sequence("p", [5])

    for given_ in (sequence, [sequence], (sequence,), iter([sequence])):
        (encoded,) = values.encode_sequences(given_)
        assert (encoded.prompt.text, encoded.completion.tokens.shape) == ("p", [1])


def test_what_is_no_sequence_is_refused_by_name():
    with pytest.raises(TypeError, match=r"sequences\[1\] must be a Sequence, not tuple: \('p', 'c'\)"):
        values.encode_sequences([Sequence("p", "c"), ("p", "c")])
    with pytest.raises(TypeError, match="sequences must be a Sequence or several, not int"):
        values.encode_sequences(3)


def test_a_lora_shape_is_encoded_whole():
    lora = LoraSpec(8, 4.0, ("q_proj", "v_proj"), True, {"q": 4}, {"v": 2.0})

    encoded = values.encode_lora(lora)

    assert (encoded.rank, encoded.alpha, encoded.use_rslora) == (8, 4.0, True)
    assert list(encoded.target_modules) == ["q_proj", "v_proj"]
    assert (dict(encoded.rank_pattern), dict(encoded.alpha_pattern)) == ({"q": 4}, {"v": 2.0})
    assert list(values.encode_lora(LoraSpec(target_modules="all-linear")).target_modules) == ["all-linear"]


@pytest.mark.parametrize(
    ("lora", "error"),
    [(LoraSpec(rank="x"), TypeError), (LoraSpec(rank=2.5), TypeError), (LoraSpec(rank=2**40), ValueError)],
)
def test_a_setting_that_cannot_be_encoded_is_refused_by_name(lora, error):
    with pytest.raises(error, match=r"lora\.rank="):
        values.encode_lora(lora)


def test_a_name_is_one_of_those_there_are():
    with pytest.raises(ValueError, match="kind must be one of policy, reward, reference, critic, not 'judge'"):
        values.encode_name(values.KINDS, "judge", "kind")
    with pytest.raises(InternalError, match="99"):
        values.decode_name(values.KINDS, 99)
    for name, number in values.KINDS.items():
        assert values.decode_name(values.KINDS, values.encode_name(values.KINDS, name, "kind")) == name
        assert pb.AdapterKind.Name(number) == f"ADAPTER_KIND_{name.upper()}"


def test_numbers_and_names_come_in_pairs():
    assert values.pair(["a", "b"], [1.0, 2.0]) == {"a": 1.0, "b": 2.0}
    with pytest.raises(InternalError, match="3 numbers for 2 reward terms"):
        values.pair(["a", "b"], [1.0, 2.0, 3.0])
