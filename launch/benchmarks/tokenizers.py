"""The suite `tokenizers` of launch/benchmark.py: ids of Hugging Face, llama.cpp and our reading of one file.

Every kind of `tokenizer_kinds` is read from its Hugging Face directory, written as the metadata of a GGUF without
weights, and read back; 2,000 lines of mixed text are cut by all three. Where llama.cpp differs from Hugging Face in
principle, the lines that show it are counted apart; our reading has to equal llama.cpp on all of them.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from benchmarks.measuring import Numbers, said
from benchmarks.tokenizer_kinds import KINDS, VOCABULARY, Kind, lines
from tokenizers import Tokenizer

from ramp_jax.halo.llama_quantize import captured_log, last_line, require
from ramp_jax.models.gguf_source import open_gguf
from ramp_jax.models.metadata import Metadata, PairsWriter, plain, typed
from ramp_jax.models.tokenizers import pre, tokenizer_from_directory, tokenizer_from_gguf

Encode = Callable[[str], list[int]]


def tokenizers(_: int) -> Numbers:
    """How many lines agree, per kind."""
    rows = []
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"kind": name, **compare(kind, Path(folder))})
            said(rows[-1])
    return {"rows": rows}


def compare(kind: Kind, folder: Path) -> dict[str, Any]:
    """One row: llama.cpp's name for it, lines that agree of those that should, and the metadata of our reading."""
    kind.build(folder / "hf")
    _, pairs = tokenizer_from_directory(folder / "hf", VOCABULARY)
    path = write_vocabulary(folder / "vocabulary.gguf", pairs, kind.name)
    fields = plain(open_gguf(path).metadata)
    ours = tokenizer_from_gguf(fields, path)
    texts = lines(kind.specials)
    apart = [kind.apart(text) for text in texts]
    with llama_cpp(path) as encode:
        ids = [encode(text) for text in texts]
    reference = hugging_face(folder / "hf")
    theirs = [reference(text) == found for text, found in zip(texts, ids, strict=True)]
    read = [ours(text)["input_ids"] == found for text, found in zip(texts, ids, strict=True)]
    ours.save_pretrained(folder / "again")
    again = plain(tokenizer_from_directory(folder / "again", VOCABULARY)[1])
    return {
        "pre": fields["tokenizer.ggml.pre"],
        "lines": len(texts),
        "Hugging Face = llama.cpp": _share(theirs, [not line for line in apart]),
        "where they differ in principle": _share(theirs, apart),
        "ours = llama.cpp": _share(read, [not (line and kind.ours_too) for line in apart]),
        "metadata of our reading": ", ".join(differing(fields, again)) or "the same",
        "principle": kind.reason,
    }


def _share(same: list[bool], among: list[bool]) -> str:
    return f"{sum(s for s, a in zip(same, among, strict=True) if a)} of {sum(among)}"


def differing(fields: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """Keys of the tokenizer whose values are not the same. Scores are left out, since only their order counts, and
    pre-tokenizers are the same that cut alike."""
    keys = {key for key in (*fields, *again) if key.startswith("tokenizer.")} - {"tokenizer.ggml.scores"}
    return sorted(key for key in keys if _value(fields, key) != _value(again, key))


def _value(fields: dict[str, Any], key: str) -> Any:
    value = fields.get(key)
    known = pre.get(value) if key == "tokenizer.ggml.pre" and fields["tokenizer.ggml.model"] == "gpt2" else None
    return known.splits if known else value


def hugging_face(folder: Path) -> Encode:
    """What `tokenizers` does with the directory's file, or SentencePiece where its own file is all there is."""
    if (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: backend.encode(text).ids
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda text: processor.encode(text, add_bos=True)


def write_vocabulary(path: Path, pairs: Metadata, name: str = "model") -> Path:
    """A GGUF of a tokenizer alone."""
    writer = PairsWriter(path, "llama")
    for key, pair in (typed({"general.name": name}) | pairs).items():
        writer.add_key_value(key, pair.value, pair.type, pair.sub_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextlib.contextmanager
def vocabulary(path: Path) -> Iterator[tuple[Any, Any]]:
    """The library, and the vocabulary that it loads from a file; what it logs meanwhile is kept back."""
    require()
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with captured_log() as log:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp could not load the vocabulary of {path}: {last_line(log)}.")
        try:
            yield llama_cpp, llama_cpp.llama_model_get_vocab(model)
        finally:
            llama_cpp.llama_model_free(model)


@contextlib.contextmanager
def llama_cpp(path: Path, special: bool = True) -> Iterator[Encode]:
    """llama.cpp's ids of a text, with what a file puts around texts; `special`: special tokens in texts are found."""
    with vocabulary(path) as (library, loaded):

        def encode(text: str) -> list[int]:
            raw = text.encode("utf-8")
            buffer = (library.llama_token * (len(raw) + 8))()
            count = library.llama_tokenize(loaded, raw, len(raw), buffer, len(buffer), True, special)
            return list(buffer[:count])

        yield encode
