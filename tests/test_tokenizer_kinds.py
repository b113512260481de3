"""Ids of Hugging Face, of the exported file in llama.cpp and of our reading of that file, on 2,000 lines of mixed text.

Where llama.cpp differs from Hugging Face in principle, `tokenizer_kinds` says why and on which lines; our reading goes
by llama.cpp.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from ramp_jax.models.gguf_source import open_gguf
from ramp_jax.models.metadata import plain, typed
from ramp_jax.models.tokenizers import tokenizer_from_directory, tokenizer_from_gguf

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks import tokenizers as suite
from benchmarks.tokenizer_kinds import KINDS, VOCABULARY, lines

NUMBERS = {"tokenizer.ggml.scores": np.float32, "tokenizer.ggml.token_type": np.int32}


def all_of(share):
    found, of = share.split(" of ")
    return found == of


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_hugging_face_and_of_llama_cpp(tmp_path, name):
    kind = KINDS[name]
    row = suite.compare(kind, tmp_path)
    assert row["pre"] == kind.pre
    assert row["lines"] == 2000
    assert all_of(row["Hugging Face = llama.cpp"])
    assert all_of(row["ours = llama.cpp"])
    assert row["metadata of our reading"] == "the same"
    assert bool(kind.reason) != all_of(row["where they differ in principle"])


@pytest.mark.parametrize("name", ["Llama-3", "OLMo", "Llama-2", "Gemma"])
def test_texts_without_special_tokens_are_cut_alike_whether_llama_cpp_looks_for_them_or_not(tmp_path, name):
    kind = KINDS[name]
    kind.build(tmp_path / "hf")
    _, pairs = tokenizer_from_directory(tmp_path / "hf", VOCABULARY)
    path = suite.write_vocabulary(tmp_path / "vocabulary.gguf", pairs)
    ours = tokenizer_from_gguf(plain(pairs), path)
    with suite.llama_cpp(path, special=False) as encode:
        for text in lines((), 300):
            assert encode(text) == ours(text)["input_ids"]


def written(fields, folder):
    """A GGUF of a tokenizer's values, and our reading of it."""
    pairs = typed({key: np.asarray(v, NUMBERS[key]) if key in NUMBERS else v for key, v in fields.items()})
    path = suite.write_vocabulary(folder / "vocabulary.gguf", pairs)
    return path, tokenizer_from_gguf(plain(open_gguf(path).metadata), path)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    """GGUF values of the Llama-2 kind."""
    folder = tmp_path_factory.mktemp("llama2")
    KINDS["Llama-2"].build(folder)
    return plain(tokenizer_from_directory(folder, VOCABULARY)[1])


def scores(draw):
    return lambda fields: {"tokenizer.ggml.scores": draw(len(fields["tokenizer.ggml.tokens"])).astype(float).tolist()}


def without_letters(fields):
    tokens = fields["tokenizer.ggml.tokens"]
    return {"tokenizer.ggml.tokens": [f"no{i}" if len(t) == 1 and t in "aeiou字é" else t for i, t in enumerate(tokens)]}


def all_normal(fields):
    return {"tokenizer.ggml.token_type": [1 if kind == 3 else kind for kind in fields["tokenizer.ggml.token_type"]]}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(scores(lambda n: np.full(n, -1000)), id="no scores, as from a tokenizer.json alone"),
        pytest.param(scores(lambda n: np.random.default_rng(0).integers(-20, 0, n)), id="ties"),
        pytest.param(scores(lambda n: np.random.default_rng(0).permutation(n)), id="any order"),
        pytest.param(without_letters, id="tokens of letters that are no tokens"),
        pytest.param(all_normal, id="BOS and EOS of the normal type"),
        pytest.param(lambda fields: {"tokenizer.ggml.add_space_prefix": False}, id="no space in front"),
        pytest.param(lambda fields: {"tokenizer.ggml.add_eos_token": True}, id="EOS added"),
        pytest.param(lambda fields: {"tokenizer.ggml.padding_token_id": 400}, id="padding with a word"),
        pytest.param(lambda fields: {"tokenizer.ggml.bos_token_id": 2**32 - 1}, id="BOS out of range"),
    ],
)
def test_any_file_of_sentencepiece_is_read_as_llama_cpp_reads_it(tmp_path, llama2, change):
    path, ours = written(llama2 | change(llama2), tmp_path)
    runs = [text * n for text in ("-", "ab", " ", "=-") for n in range(1, 24)]
    with suite.llama_cpp(path) as encode:
        for text in [*lines(("<s>", "</s>"), 500), *runs, ""]:
            assert ours(text)["input_ids"] == encode(text)
