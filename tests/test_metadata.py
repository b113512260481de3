"""GGUF's key-value pairs: their types, their bytes, and what files of others hold."""

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType as T
from hypothesis import given
from hypothesis import strategies as st

from ramp_jax.models.gguf_source import open_gguf
from ramp_jax.models.metadata import KeyValue, PairsWriter, metadata_bytes, plain, typed
from ramp_jax.models.tokenizers import tokenizer_from_directory

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks.tokenizer_kinds import KINDS, VOCABULARY
from benchmarks.tokenizers import llama_cpp, write_vocabulary

ALIGNMENT = 32
PAIRS = {
    "a.text": KeyValue("naïve 🙂", T.STRING),
    "a.flag": KeyValue(True, T.BOOL),
    "a.small": KeyValue(7, T.UINT16),
    "a.negative": KeyValue(-7, T.INT32),
    "a.large": KeyValue(1 << 40, T.UINT64),
    "a.double": KeyValue(0.1, T.FLOAT64),
    "a.texts": KeyValue(["", "b"], T.ARRAY, T.STRING),
    "a.flags": KeyValue([True, False, True], T.ARRAY, T.BOOL),
    "a.no_texts": KeyValue([], T.ARRAY, T.STRING),
    "a.no_scores": KeyValue([], T.ARRAY, T.FLOAT32),
}


def written(path, pairs):
    writer = PairsWriter(path, "llama")
    for name, pair in pairs.items():
        writer.add_key_value(name, pair.value, pair.type, pair.sub_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_type_comes_back_and_takes_the_bytes_that_are_counted(tmp_path):
    """Empty arrays too, with the type of their elements."""
    path = written(tmp_path / "pairs.gguf", PAIRS)
    found = open_gguf(path).metadata
    assert {name: pair for name, pair in found.items() if name != "general.architecture"} == PAIRS
    header = 4 + 4 + 8 + 8
    assert path.stat().st_size == -(-(header + metadata_bytes(found)) // ALIGNMENT) * ALIGNMENT


@pytest.mark.parametrize(
    ("value", "kind", "of"),
    [
        ("a", T.STRING, None),
        (np.bool_(True), T.BOOL, None),
        (3, T.UINT32, None),
        (np.int64(3), T.UINT32, None),
        (-3, T.INT64, None),
        (1 << 63, T.UINT64, None),
        (0.5, T.FLOAT32, None),
        ([], T.ARRAY, T.STRING),
        (["a"], T.ARRAY, T.STRING),
        ([1, 2], T.ARRAY, T.UINT32),
        (np.zeros(0, np.float32), T.ARRAY, T.FLOAT32),
        (np.arange(3, dtype=np.int32), T.ARRAY, T.INT32),
        (np.array([True]), T.ARRAY, T.BOOL),
    ],
)
def test_type_of_a_value(value, kind, of):
    assert typed({"a": value})["a"][1:] == (kind, of)


@pytest.mark.parametrize("value", [None, {"a": 1}, [{"name": "default"}], ["a", 1], 1 << 64, np.zeros((2, 2))])
def test_value_that_gguf_cannot_hold(value):
    with pytest.raises(
        ValueError, match=r"(?s)^a\.b cannot be written to GGUF: .* is neither text, a number nor a list"
    ):
        typed({"a.b": value})


SCALARS = st.text() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(width=32, allow_nan=False)


@given(st.dictionaries(st.sampled_from("abcdef").map("x.{}".format), SCALARS | st.lists(st.text(), max_size=3)))
def test_what_is_typed_can_be_written(tmp_path_factory, values):
    pairs = typed(values)
    path = written(tmp_path_factory.mktemp("pairs") / "pairs.gguf", pairs)
    assert plain(open_gguf(path).metadata) == {"general.architecture": "llama"} | values


def test_llama_cpp_reads_empty_arrays(tmp_path):
    KINDS["GPT-2"].build(tmp_path)
    pairs = tokenizer_from_directory(tmp_path, VOCABULARY)[1] | {"a.none": KeyValue([], T.ARRAY, T.STRING)}
    with llama_cpp(write_vocabulary(tmp_path / "v.gguf", pairs)) as encode:
        assert encode("a")
