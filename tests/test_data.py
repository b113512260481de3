"""Token windows: deterministic, disjoint, and never held-out text in calibration."""

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


def test_bos_replaces_the_first_token_where_the_tokenizer_adds_one():
    plain, adding = tiny.builtin_tokenizer(), tiny.builtin_tokenizer()
    bos = (tiny.END, adding.bos_token_id)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny.END} $A", special_tokens=[bos]
    )
    without = data.windows("builtin", plain, context=CONTEXT, count=4)
    with_bos = data.windows("builtin", adding, context=CONTEXT, count=4)
    np.testing.assert_array_equal(with_bos[:, 0], [adding.bos_token_id] * 4)
    np.testing.assert_array_equal(with_bos[:, 1:], without[:, 1:])
    assert (without[:, 0] != adding.bos_token_id).all()


@pytest.mark.parametrize(("split", "available"), [("calibration", 8), ("heldout", 2)])
def test_text_that_is_too_short_says_what_it_holds(split, available):
    with pytest.raises(ValueError, match=f"the {split} part .* holds {available} windows of 100 tokens, fewer than"):
        data.windows("builtin", Counter(), context=100, count=available + 1, split=split)


def test_missing_file(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt' is not a file; pass a text file, builtin, or hf:"):
        data.windows(str(tmp_path / "absent.txt"), tokenizer, context=CONTEXT, count=1)


def test_rows_of_a_hub_data_set_are_joined(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return {"text": ["first", "second"]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert data.read_text("hf:owner/name::test") == "first\nsecond"
    assert asked == [("owner/name", None, "test")]


@pytest.mark.parametrize("source", ["hf:only-a-name", "hf:a:b"])
def test_malformed_hub_reference(source):
    with pytest.raises(FileNotFoundError, match=r"the form is hf:NAME:CONFIG:SPLIT"):
        data.read_text(source)
