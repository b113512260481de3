"""Token windows: deterministic, disjoint, and never held-out text in calibration."""

import abc
import argparse
import copy
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from tokenizers import processors

from ramp_jax import data

CONTEXT = 16


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.builtin_tokenizer()


class Counter:
    """A tokenizer of which every text is 1000 tokens whose ids are their positions."""

    bos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return list(range(1000))


def test_builtin_text_is_long_english_and_the_same_every_time():
    text = data.read_text("builtin")
    assert text == data.read_text("builtin")
    assert len(text) > 300_000
    assert "Assert statements are a convenient way to insert debugging" in text


def test_windows_are_deterministic_and_int32(tokenizer):
    first = data.windows("builtin", tokenizer, context=CONTEXT, count=20)
    assert first.shape == (20, CONTEXT)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, data.windows("builtin", tokenizer, context=CONTEXT, count=20))


def test_windows_are_pieces_of_the_text(tmp_path, tokenizer):
    text = data.read_text("builtin")[:3000]
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    for window in data.windows(str(path), tokenizer, context=CONTEXT, count=5):
        assert tokenizer.decode(window) in text


@pytest.mark.parametrize(("context", "count"), [(10, 3), (16, 50), (7, 114), (200, 4)])
def test_calibration_windows_spread_over_the_first_four_fifths(context, count):
    chosen = data.windows("builtin", Counter(), context=context, count=count)
    positions = chosen.reshape(-1)
    assert np.unique(positions).size == count * context
    assert positions.max() < 800
    np.testing.assert_array_equal(np.diff(chosen, axis=1), 1)
    gaps = np.diff(chosen[:, 0])
    assert np.ptp(gaps) <= context


@pytest.mark.parametrize(("context", "count"), [(10, 20), (16, 12), (200, 1)])
def test_heldout_windows_begin_after_them(context, count):
    chosen = data.windows("builtin", Counter(), context=context, count=count, split="heldout")
    assert chosen.min() >= 800
    assert np.unique(chosen).size == count * context


def test_windows_by_hand():
    chosen = data.windows("builtin", Counter(), context=100, count=3)
    np.testing.assert_array_equal(chosen[:, 0], [0, 200, 500])  # windows 0, 8 // 3 and 16 // 3 of 8
    np.testing.assert_array_equal(chosen[:, -1], [99, 299, 599])


def test_bos_where_the_tokenizer_adds_one():
    plain, adding = tiny.builtin_tokenizer(), tiny.builtin_tokenizer()
    bos = (tiny.END, adding.bos_token_id)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny.END} $A", special_tokens=[bos]
    )
    text = [adding.bos_token_id, *plain.encode(data.read_text("builtin"))]
    expected = np.reshape(text[: 4 * CONTEXT], (4, CONTEXT))
    as_papers = data.windows("builtin", adding, context=CONTEXT, count=None, split="all", bos="text")
    assert as_papers.shape == (len(text) // CONTEXT, CONTEXT)
    np.testing.assert_array_equal(as_papers[:4], expected)
    as_llama_cpp = data.windows("builtin", adding, context=CONTEXT, count=None, split="all")
    np.testing.assert_array_equal(as_llama_cpp[:, 0], adding.bos_token_id)
    np.testing.assert_array_equal(as_llama_cpp[:, 1:], as_papers[:, 1:])


@pytest.mark.parametrize(("split", "available"), [("calibration", 8), ("heldout", 2)])
def test_text_that_is_too_short_says_what_it_holds(split, available):
    with pytest.raises(ValueError, match=f"the {split} part .* holds {available} windows of 100 tokens, fewer than"):
        data.windows("builtin", Counter(), context=100, count=available + 1, split=split)


def test_missing_file(tmp_path, tokenizer):
    with pytest.raises(
        FileNotFoundError, match=r"absent\.txt' is not a file; pass a text file, builtin, stdlib, mixture,"
    ):
        data.windows(str(tmp_path / "absent.txt"), tokenizer, context=CONTEXT, count=1)


@pytest.mark.parametrize("split", ["calibration", "heldout", "all"])
def test_text_shorter_than_one_window(split):
    held = {"calibration": 800, "heldout": 200, "all": 1000}[split]
    for count in (1, None):
        with pytest.raises(ValueError, match=f"the {split} part of .* holds {held} tokens, fewer than one window"):
            data.windows("builtin", Counter(), context=held + 1, count=count, split=split)


def test_all_windows_of_a_split():
    together = [data.windows("builtin", Counter(), context=10, count=None, split=s) for s in ("calibration", "heldout")]
    assert [len(part) for part in together] == [80, 20]
    np.testing.assert_array_equal(
        np.concatenate(together), data.windows("builtin", Counter(), context=10, count=None, split="all")
    )


def test_a_text_is_cut_once(tmp_path, monkeypatch):
    """By its contents: another text under the same name is cut anew."""
    path, tokenizer, seen = tmp_path / "text.txt", Counter(), []
    monkeypatch.setattr(tokenizer, "encode", lambda text, **_: seen.append(text) or list(range(50)), raising=False)
    for text in ("first", "first", "second", "first"):
        path.write_text(text)
        data.windows(str(path), tokenizer, context=5, count=2)
    assert seen == ["first", "second"]


def test_file_that_is_not_text(tmp_path, tokenizer):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.bin' is not UTF-8 text .*; convert it"):
        data.windows(str(tmp_path / "a.bin"), tokenizer, context=CONTEXT, count=1)


@pytest.fixture
def local_set(tmp_path, monkeypatch):
    """A data set of three rows that `datasets` itself reads from a folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": text, "title": "x"} for text in ("first", "", "third")]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_rows_of_a_data_set_are_joined_as_in_papers(local_set):
    assert data.read_text(f"hf:{local_set}::test") == "first\n\n\n\nthird"
    assert data.read_text(f"hf:{local_set}::test[:1]") == "first"


def test_data_set_without_texts(local_set):
    (local_set / "test.jsonl").write_text('{"sentence": "first"}')
    with pytest.raises(FileNotFoundError, match=r"\(.*Column 'text' doesn't exist.*offline choices are builtin or"):
        data.read_text(f"hf:{local_set}::test")


def test_data_set_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = "hf:owner/never-published:raw:test"
    with pytest.raises(FileNotFoundError, match=f"'{source}' could not be read .*offline choices are builtin or a"):
        data.read_text(source)


@pytest.mark.parametrize("source", ["hf:only-a-name", "hf:a:b"])
def test_malformed_hub_reference(source):
    with pytest.raises(FileNotFoundError, match=r"the form is hf:NAME:CONFIG:SPLIT"):
        data.read_text(source)


def test_stdlib_is_the_source_in_the_order_of_its_paths():
    text = data.read_text("stdlib")
    assert text == data.read_text("stdlib")
    assert len(text) > 5_000_000
    found = [text.index(Path(module.__file__).read_text(encoding="utf-8")) for module in (abc, argparse, json, zipfile)]
    assert found == sorted(found)
    assert "class TestCase" in text  # unittest itself
    assert "class AbcTest" not in text


def test_stdlib_leaves_out_what_builtin_holds_out(tokenizer):
    """No window of the topics that evaluation scores may be trained on."""
    text = data.read_text("stdlib")
    kept = data.windows("builtin", tokenizer, context=64, count=50)
    held = data.windows("builtin", tokenizer, context=64, count=None, split="heldout")
    pieces = [tokenizer.decode(window[8:-8]) for window in held]
    assert [piece for piece in pieces if re.search("[a-z]{3}", piece) and piece in text] == []  # but rules of tables
    assert sum(tokenizer.decode(window) in text for window in kept) > 25


def test_modules_of_the_stdlib():
    chosen = data.read_text("stdlib:json,abc")
    assert chosen.startswith(Path(abc.__file__).read_text(encoding="utf-8"))
    assert "def detect_encoding(b)" in chosen
    assert "class ArgumentParser" not in chosen
    with pytest.raises(FileNotFoundError, match="no source of 'jsonn'; pass names of its modules"):
        data.read_text("stdlib:abc,jsonn")


@pytest.mark.parametrize("count", [0, -1])
def test_no_window_is_not_all_windows(count):
    with pytest.raises(ValueError, match=f"{count} windows were asked for; ask for at least one"):
        data.windows("builtin", Counter(), context=10, count=count)


def test_fingerprints_are_of_the_text_whatever_its_name(tmp_path):
    (tmp_path / "a.txt").write_text("some text\nand more\n")
    (tmp_path / "b.txt").write_text("some text\nand more")
    (tmp_path / "c.txt").write_text("some text\nand less")
    a, b, c = (data.fingerprint(str(tmp_path / name)) for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b == data.fingerprint(f"{tmp_path}/./a.txt") != c


def test_a_mixture_gives_every_text_its_share(tmp_path, tokenizer):
    """Windows of each part are its own, mixed alike from the beginning, and held-out windows are of no calibration."""
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(f"{name}{i} " for i in range(8000)), encoding="utf-8")
    source = f"{tmp_path / 'a'}:3,{tmp_path / 'b'}:1"
    assert [(Path(part.source).name, part.share) for part in data.parts_of(source)] == [("a", 0.75), ("b", 0.25)]
    chosen = data.windows(source, tokenizer, context=CONTEXT, count=8)
    whose = ["".join(sorted(set("ab") & set(tokenizer.decode(window)))) for window in chosen]
    assert sorted(whose) == ["a"] * 6 + ["b"] * 2
    assert sorted(whose[:4]) == ["a"] * 3 + ["b"]
    alone = data.windows(str(tmp_path / "b"), tokenizer, context=CONTEXT, count=2)
    np.testing.assert_array_equal(chosen[[who == "b" for who in whose]], alone)
    held = data.windows(source, tokenizer, context=CONTEXT, count=None, split="heldout")
    every = data.windows(source, tokenizer, context=CONTEXT, count=None)
    assert not {window.tobytes() for window in held} & {window.tobytes() for window in every}
    assert len({data.fingerprint(name) for name in (source, source.replace(":3", ":4"), str(tmp_path / "a"))}) == 3
    assert data.windows(source, tokenizer, context=CONTEXT, count=2).shape == (2, CONTEXT)
    (tmp_path / "b").write_text("b " * 100, encoding="utf-8")
    held = data.windows(source, tokenizer, context=64, count=8, split="heldout")
    assert not any("b" in tokenizer.decode(window) for window in held)
    with pytest.raises(ValueError, match=r"'.*b' holds \d+ windows|'.*b' holds \d+ tokens"):
        data.windows(source, tokenizer, context=128, count=8)
    with pytest.raises(ValueError, match=r"the heldout parts of .* hold [\d,]+ windows of 64 tokens, fewer than asked"):
        data.windows(source, tokenizer, context=64, count=10**6, split="heldout")


def test_the_mixture_that_is_always_there(tokenizer):
    names = [part.source for part in data.parts_of("mixture")]
    assert names == ["builtin", "code", "lists", "languages"]
    assert data.is_inside("mixture")
    assert data.windows("mixture", tokenizer, context=256, count=8).shape == (8, 256)
    assert "- 404: Not Found" in data.read_text("lists")
    assert len(data.read_text("languages").split("\n\n")) == 16


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("builtin:0,code:1", "gives a text no weight above 0"),
        ("builtin:1,builtin:2", "names a text twice"),
        ("builtin:1,code", "is not a file; pass a text file, builtin"),
        ("builtin:1,code:1,lists:1", "names 3 texts and 2 windows were asked for"),
    ],
)
def test_mixtures_that_are_none(tokenizer, source, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        data.windows(source, tokenizer, context=CONTEXT, count=2)


def test_conversations_are_written_out_by_the_chat_template(tmp_path, tokenizer):
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because. " * 60}]
    path = tmp_path / "talks.jsonl"
    path.write_text((json.dumps({"messages": talk}) + "\n") * 20, encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds conversations, and the model has no chat template"):
        data.windows(str(path), tokenizer, context=CONTEXT, count=2)
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    (window,) = data.windows(str(path), talking, context=64, count=1)
    assert talking.decode(window).startswith("[user] Why?[assistant] Because.")
    talking.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"cannot write out the conversations .*roles must alternate"):
        data.windows(str(path), talking, context=64, count=1)
    path.write_text('{"text": 1}\n' * 300, encoding="utf-8")
    assert '{"text": 1}' in tokenizer.decode(data.windows(str(path), tokenizer, context=CONTEXT, count=1)[0])
