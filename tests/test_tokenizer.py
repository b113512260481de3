"""Tokenizers through GGUF metadata and back give the same ids."""

import numpy as np
import pytest
import tiny
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ramp_jax import data
from ramp_jax.models import load_model
from ramp_jax.models.gguf_source import open_gguf
from ramp_jax.models.load import resolve
from ramp_jax.models.metadata import plain
from ramp_jax.models.tokenizers import tokenizer_from_directory, tokenizer_from_gguf

TEXT = (
    data.read_text("builtin")[50_000:60_000]
    + " don't 12345 3.14  \n\n\t naïve café 日本語 🙂 x=[1,2];\r\n   trailing <|im_end|> after <|endoftext|>\n"
)


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


# As transformers stores them in the tokenizer.json of GPT-2, SmolLM2, Llama 3 and Qwen 2.
PRE_TOKENIZERS = {
    "gpt-2": byte_level(trim_offsets=True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(trim_offsets=True)]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                behavior="isolated",
            ),
            byte_level(use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                behavior="isolated",
            ),
            byte_level(use_regex=False, trim_offsets=False),
        ]
    ),
}


def fields_of(tokenizer, folder, vocab_size=tiny.VOCABULARY):
    """GGUF values of a tokenizer, through its Hugging Face directory."""
    tokenizer.save_pretrained(folder)
    return plain(tokenizer_from_directory(folder, vocab_size)[1])


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_metadata_names_the_pre_tokenizer_and_gives_the_same_ids(tmp_path, pre):
    original = tiny.builtin_tokenizer(PRE_TOKENIZERS[pre])
    fields = fields_of(original, tmp_path)
    assert fields["tokenizer.ggml.pre"] == pre
    restored = tokenizer_from_gguf(fields, tmp_path / "tiny.gguf")
    assert restored.encode(TEXT) == original.encode(TEXT)
    assert restored.decode(restored.encode(TEXT)) == original.decode(original.encode(TEXT)) == TEXT


def test_tokenizer_of_a_gguf_file_equals_the_directory_s(tmp_path, untied):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", untied.metadata, tiny.gguf_values(tied=False))
    restored = load_model(str(path)).tokenizer
    assert restored.encode(TEXT) == untied.tokenizer.encode(TEXT)
    assert (restored.bos_token, restored.eos_token) == (tiny.END, tiny.STOP)
    assert restored.decode(restored.encode("a <|im_end|> b"), skip_special_tokens=True) == "a  b"


def test_bos_is_added_where_the_original_adds_it(tmp_path):
    original = tiny.builtin_tokenizer()
    bos = (tiny.END, original.bos_token_id)
    original.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny.END} $A", special_tokens=[bos]
    )
    fields = fields_of(original, tmp_path)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    restored = tokenizer_from_gguf(fields, tmp_path / "tiny.gguf")
    assert restored.encode(TEXT)[0] == original.bos_token_id
    assert restored.encode(TEXT) == original.encode(TEXT)


def test_llama_bpe_takes_whole_words_of_the_vocabulary_before_merging(tmp_path, untied):
    fields = plain(untied.metadata) | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"][:-1], "xyzzy"]
    fields["tokenizer.ggml.merges"] = fields["tokenizer.ggml.merges"][:-1]
    assert tokenizer_from_gguf(fields, tmp_path / "tiny.gguf").encode("xyzzy") == [tiny.VOCABULARY - 1]
    fields["tokenizer.ggml.pre"] = "gpt-2"
    assert len(tokenizer_from_gguf(fields, tmp_path / "tiny.gguf").encode("xyzzy")) == 5


def test_metadata_carries_special_tokens_and_template(tmp_path):
    original = tiny.builtin_tokenizer(unk_token=tiny.END, pad_token=tiny.STOP, chat_template="{{ messages }}")
    fields = fields_of(original, tmp_path, tiny.VOCABULARY + 3)
    end, stop = original.convert_tokens_to_ids([tiny.END, tiny.STOP])
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.unknown_token_id"] == end
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.padding_token_id"] == stop
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert len(fields["tokenizer.ggml.tokens"]) == tiny.VOCABULARY + 3
    types = np.array(fields["tokenizer.ggml.token_type"])
    np.testing.assert_array_equal(np.flatnonzero(types == 3), sorted([end, stop]))
    np.testing.assert_array_equal(types[-3:], [5] * 3)


def test_tokenizer_that_llama_cpp_has_no_name_for(tmp_path):
    with pytest.raises(ValueError, match=r"no pre-tokenizer that cuts words as this one.*--tokenizer_from=FILE\.gguf"):
        fields_of(tiny.builtin_tokenizer(pre_tokenizers.Whitespace()), tmp_path)


def test_tokenizer_that_is_no_bpe(tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ValueError, match=r"no vocabulary of type WordLevel.*--tokenizer_from=FILE\.gguf"):
        fields_of(words, tmp_path, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "jina"}, "pre-tokenizer 'jina' is not supported; supported are gpt-2, olmo, smollm"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer model 't5' is not supported; supported are gpt2, llama"),
    ],
)
def test_metadata_of_an_unknown_tokenizer(tmp_path, untied, change, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(plain(untied.metadata) | change, tmp_path / "tiny.gguf")


def test_smollm2_cuts_words_and_digits_as_published():
    path = resolve("smollm2-135m")
    fields = plain(open_gguf(path).metadata)
    tokenizer = tokenizer_from_gguf(fields, path)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Hello world 2024")) == [
        *("Hello", "Ġworld", "Ġ", "2", "0", "2", "4"),
    ]
    assert tokenizer.encode("<|im_start|>user") == [1, *tokenizer.encode("user")]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
