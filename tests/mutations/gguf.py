"""GGUF files: their header field by field, their pairs and tensors as a whole, their bytes."""

import dataclasses
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from mutations import Kind, Mutation, raw
from ramp_jax.models import Model, load_model
from ramp_jax.models.store import in_memory

_LAYERS, _WIDTH, _HEADS, _KV_HEADS, _HEAD, _FF = 2, 64, 4, 2, 16, 96
_SPECIAL = ("<|endoftext|>", "<|im_end|>")
_MERGES = ("Ġ t", "h e", "Ġt he", "i n", "e r", "a n", "in g")


def make(folder: Path) -> Path:
    """A tiny Llama with a byte-level vocabulary, its matrices in four types."""
    return _written(folder / "tiny.gguf", "gpt2")


def make_sentencepiece(folder: Path) -> Path:
    """The same with a SentencePiece vocabulary and one tensor for embedding and head."""
    return _written(folder / "tiny.gguf", "llama")


def _written(path: Path, vocabulary: str) -> Path:
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(_LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_FF)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(_HEAD)
    size = _byte_level(writer) if vocabulary == "gpt2" else _sentencepiece(writer)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, shape in _shapes(size, tied=vocabulary == "llama").items():
        values = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape).astype(np.float32)
        kind = _type(name)
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(vocabulary: int, tied: bool) -> dict[str, tuple[int, ...]]:
    block = {
        "attn_norm": (_WIDTH,),
        "attn_q": (_HEADS * _HEAD, _WIDTH),
        "attn_k": (_KV_HEADS * _HEAD, _WIDTH),
        "attn_v": (_KV_HEADS * _HEAD, _WIDTH),
        "attn_output": (_WIDTH, _HEADS * _HEAD),
        "ffn_norm": (_WIDTH,),
        "ffn_gate": (_FF, _WIDTH),
        "ffn_up": (_FF, _WIDTH),
        "ffn_down": (_WIDTH, _FF),
    }
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(_LAYERS) for name, shape in block.items()}
    ends = {"token_embd.weight": (vocabulary, _WIDTH), "output_norm.weight": (_WIDTH,)}
    return ends | blocks | ({} if tied else {"output.weight": (vocabulary, _WIDTH)})


def _type(name: str) -> GGMLQuantizationType:
    kinds = {"ffn_down": "Q8_0", "ffn_up": "Q4_0", "attn_q": "F16", "token_embd": "BF16"}
    return next((GGMLQuantizationType[kind] for part, kind in kinds.items() if part in name), GGMLQuantizationType.F32)


def _byte_level(writer: GGUFWriter) -> int:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*_SPECIAL, *map(chr, printable), *others, *(merge.replace(" ", "") for merge in _MERGES)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *(1 for _ in tokens[2:])])
    writer.add_token_merges(list(_MERGES))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    return len(tokens)


def _sentencepiece(writer: GGUFWriter) -> int:
    pieces = ["▁t", "he", "▁the", "in", "er", *"▁abcdefghijklmnopqrstuvwxyz.,"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *(6 for _ in range(256)), *(1 for _ in pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(True)
    return len(tokens)


class _Number(NamedTuple):
    """A number of the header: what it says, where it stands, as `struct` has it."""

    what: str
    at: int
    form: str


class _Record(NamedTuple):
    """A pair or the description of a tensor, from its name to its end."""

    name: str
    start: int
    end: int


@dataclasses.dataclass
class _Header:
    """Where everything before the data stands."""

    counts: list[_Number] = dataclasses.field(default_factory=list)  # of tensors, pairs, elements, characters
    types: list[_Number] = dataclasses.field(default_factory=list)
    values: list[_Number] = dataclasses.field(default_factory=list)  # single ones
    elements: list[_Number] = dataclasses.field(default_factory=list)  # of arrays
    sizes: list[_Number] = dataclasses.field(default_factory=list)  # dimensions, their number
    offsets: list[_Number] = dataclasses.field(default_factory=list)
    texts: list[_Record] = dataclasses.field(default_factory=list)
    pairs: list[_Record] = dataclasses.field(default_factory=list)
    tensors: list[_Record] = dataclasses.field(default_factory=list)
    end: int = 0


_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def _header(content: bytes) -> _Header:
    """The places of a good file's header."""
    found, at = _Header(), 4

    def number(kind: list[_Number], what: str, form: str) -> Any:
        nonlocal at
        kind.append(_Number(what, at, form))
        at += struct.calcsize(form)
        return struct.unpack_from(form, content, at - struct.calcsize(form))[0]

    def text(what: str) -> str:
        nonlocal at
        size = number(found.counts, f"length of {what}", "<Q")
        found.texts.append(_Record(what, at, at + size))
        at += size
        return content[at - size : at].decode()

    number(found.types, "version", "<I")
    n_tensors = number(found.counts, "number of tensors", "<Q")
    n_pairs = number(found.counts, "number of pairs", "<Q")
    for _ in range(n_pairs):
        start = at
        key = text("a key")
        kind = number(found.types, f"type of {key}", "<I")
        if kind == _STRING:
            text(key)
        elif kind == _ARRAY:
            kind, length = number(found.types, f"elements of {key}", "<I"), number(found.counts, f"size of {key}", "<Q")
            for i in range(length):
                text(f"{key}[{i}]") if kind == _STRING else number(found.elements, f"{key}[{i}]", _FORMS[kind])
        else:
            number(found.values, key, _FORMS[kind])
        found.pairs.append(_Record(key, start, at))
    for _ in range(n_tensors):
        start = at
        name = text("the name of a tensor")
        for i in range(number(found.sizes, f"rank of {name}", "<I")):
            number(found.sizes, f"dimension {i} of {name}", "<Q")
        number(found.types, f"type of {name}", "<I")
        number(found.offsets, f"offset of {name}", "<Q")
        found.tensors.append(_Record(name, start, at))
    found.end = at
    return found


_ODD = [0, 1, 2, 3, 5, 6, 8, 33, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
_ODD_FLOATS = [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-38, 1e38, 1e-45, 2.0, 0.5]


def _numbers(which: str) -> Mutation:
    """Another value for one number of the header, odd or near what is there."""

    def change(path: Path, rng: np.random.Generator) -> str:
        content = bytearray(path.read_bytes())
        places = getattr(_header(bytes(content)), which)
        what, at, form = places[rng.integers(len(places))]
        old = struct.unpack_from(form, content, at)[0]
        if form in ("<f", "<d"):
            new = float([*_ODD_FLOATS, -old, old * 2, old + 1][rng.integers(len(_ODD_FLOATS) + 3)])
        else:
            new = [*_ODD, old + 1, old - 1, old + 32, old * 2, old // 2][rng.integers(len(_ODD) + 5)]
            bits = 8 * struct.calcsize(form)
            new %= 1 << bits
            new -= (1 << bits) if form.islower() and new >= 1 << (bits - 1) else 0
        struct.pack_into(form, content, at, new)
        path.write_bytes(content)
        return f"{what} = {new}, was {old}"

    return change


def text(path: Path, rng: np.random.Generator) -> str:
    """Another byte in a name or a text, or another of the file's texts of the same length in its place."""
    content = bytearray(path.read_bytes())
    texts = [record for record in _header(bytes(content)).texts if record.end > record.start]
    record = texts[rng.integers(len(texts))]
    old = bytes(content[record.start : record.end])
    alike = [other for other in texts if other.end - other.start == len(old)]
    if rng.random() < 0.5:
        other = alike[rng.integers(len(alike))]
        content[record.start : record.end] = content[other.start : other.end]
    else:
        content[record.start + rng.integers(len(old))] = [0, 32, 65, 0x80, 0xFF, 10][rng.integers(6)]
    path.write_bytes(content)
    return f"{record.name}: {bytes(content[record.start : record.end])!r:.60}, was {old!r:.60}"


def _records(which: str) -> Mutation:
    """Pairs or tensors left out, repeated or in another order, mostly with the number of them that is then right.

    The data stays where it is.
    """

    def change(path: Path, rng: np.random.Generator) -> str:
        content = path.read_bytes()
        header = _header(content)
        parts = {name: [content[r.start : r.end] for r in getattr(header, name)] for name in ("pairs", "tensors")}
        chosen, i = parts[which], int(rng.integers(len(parts[which])))
        name = getattr(header, which)[i].name
        how = ["removed", "repeated", "moved"][rng.integers(3)]
        taken = chosen.pop(i)
        if how != "removed":
            chosen.insert(int(rng.integers(len(chosen) + 1)), taken)
        if how == "repeated":
            chosen.insert(int(rng.integers(len(chosen) + 1)), taken)
        adjusted = rng.random() < 0.9
        counts = [len(parts["tensors"]), len(parts["pairs"])] if adjusted else [len(header.tensors), len(header.pairs)]
        start = content[:8] + struct.pack("<QQ", *counts) + b"".join(parts["pairs"] + parts["tensors"])
        padding = b"\0" * (-len(start) % GGUF_DEFAULT_ALIGNMENT)
        path.write_bytes(start + padding + content[_data(header) :])
        return f"{name} {how}" + ("" if adjusted else ", their number as before")

    return change


def retype(path: Path, rng: np.random.Generator) -> str:
    """A pair with a value of another type, soundly written."""
    content = path.read_bytes()
    header = _header(content)
    record = header.pairs[rng.integers(len(header.pairs))]
    values = {
        4: [0, 1, 7, 2**31, 2**32 - 1],
        5: [0, 1, -1, -(2**31)],
        6: [0.0, 1.0, -1.0, 64.0, float("nan"), float("inf")],
        7: [0, 1],
        _STRING: ["", "4", "text", "ä" * 300],
        10: [0, 2, 2**63, 2**64 - 1],
        11: [1, -1, -(2**63)],
        12: [4.0, 1e300, float("nan")],
    }
    kind = list(values)[rng.integers(len(values))]
    value = values[kind][rng.integers(len(values[kind]))]
    count = [None, None, None, 0, 1, 2][rng.integers(6)]  # elements of an array, None: no array
    raw = value.encode() if kind == _STRING else struct.pack(_FORMS[kind], value)
    raw = struct.pack("<Q", len(raw)) + raw if kind == _STRING else raw
    typed = struct.pack("<I", kind) + raw
    if count is not None:
        typed = struct.pack("<IIQ", _ARRAY, kind, count) + raw * count
    key = content[record.start : record.start + 8 + len(record.name.encode())]
    start = content[: record.start] + key + typed + content[record.end : header.end]
    path.write_bytes(start + b"\0" * (-len(start) % GGUF_DEFAULT_ALIGNMENT) + content[_data(header) :])
    return f"{record.name} is {value!r:.40} of type {kind}" + ("" if count is None else f", {count} times in an array")


_U32, _I32, _F32, _BOOL, _U16 = 4, 5, 6, 7, 2
_KNOWN: dict[str, tuple[int, list[Any]]] = {
    "llama.attention.key_length": (_U32, [0, 8, 16, 17, 2**31, 2**32 - 1]),
    "llama.attention.value_length": (_U32, [0, 8, 16]),
    "llama.attention.sliding_window": (_U32, [0, 16, 2**31, 2**32 - 1]),
    "llama.attention.causal": (_BOOL, [0, 1]),
    "llama.rope.scaling.type": (_STRING, ["none", "linear", "yarn", "longrope", "x"]),
    "llama.rope.scaling.factor": (_F32, [0.0, 1.0, 2.0, -2.0, 1e30, 1e-30, float("nan"), float("inf")]),
    "llama.rope.scale_linear": (_F32, [0.0, 4.0, float("nan")]),
    "llama.rope.scaling.original_context_length": (_U32, [0, 1, 64, 2**31]),
    "llama.rope.scaling.attn_factor": (_F32, [0.0, 1.0, 2.0, float("nan")]),
    "llama.rope.scaling.yarn_log_multiplier": (_F32, [0.0, 0.1, float("nan")]),
    "llama.expert_count": (_U32, [0, 8]),
    "llama.vocab_size": (_U32, [0, 5, 265, 2**31]),
    "llama.logit_scale": (_F32, [0.0, 1.0, 2.0, float("nan")]),
    "general.alignment": (_U32, [0, 1, 16, 32, 33, 64, 2**31]),
    "general.file_type": (_U32, [0, 2**31]),
    "split.count": (_U16, [0, 1, 2, 65_535]),
    "split.tensors.count": (_I32, [-1, 0, 5, 2**31 - 1]),
    "tokenizer.ggml.padding_token_id": (_U32, [0, 3, 265, 5000, 2**32 - 1]),
    "tokenizer.ggml.eot_token_id": (_I32, [-1, 0, 5000]),
    "tokenizer.ggml.add_eos_token": (_BOOL, [0, 1, 2]),
}


def known_keys(path: Path, rng: np.random.Generator) -> str:
    """Pairs that some files have, with a sound or an odd value."""
    content = path.read_bytes()
    header = _header(content)
    keys = rng.choice(list(_KNOWN), rng.integers(1, 4), replace=False).tolist()
    pairs, chosen = b"", {}
    for key in keys:
        kind, values = _KNOWN[key]
        chosen[key] = values[rng.integers(len(values))]
        pairs += _packed(key) + struct.pack("<I", kind)
        pairs += _packed(chosen[key]) if kind == _STRING else struct.pack(_FORMS[kind], chosen[key])
    counts = struct.pack("<QQ", len(header.tensors), len(header.pairs) + len(keys))
    at = header.tensors[0].start
    start = content[:8] + counts + content[24:at] + pairs + content[at : header.end]
    path.write_bytes(start + b"\0" * (-len(start) % GGUF_DEFAULT_ALIGNMENT) + content[_data(header) :])
    return f"{chosen}"


def _packed(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def elements(path: Path, rng: np.random.Generator) -> str:
    """An array one element shorter or longer, its length adjusted."""
    content = path.read_bytes()
    header = _header(content)
    sizes = [number for number in header.counts if number.what.startswith("size of ")]
    number = sizes[rng.integers(len(sizes))]
    key = number.what.removeprefix("size of ")
    inside = [(n.at, n.at + struct.calcsize(n.form)) for n in header.elements if n.what.startswith(f"{key}[")]
    inside += [(r.start - 8, r.end) for r in header.texts if r.name.startswith(f"{key}[")]
    start, end = inside[rng.integers(len(inside))]
    shorter = rng.random() < 0.5
    changed = content[:start] + content[start:end] * (0 if shorter else 2) + content[end : header.end]
    length = struct.pack("<Q", len(inside) + (-1 if shorter else 1))
    changed = changed[: number.at] + length + changed[number.at + 8 :]
    padding = b"\0" * (-len(changed) % GGUF_DEFAULT_ALIGNMENT)
    path.write_bytes(changed + padding + content[_data(header) :])
    return f"{key} has an element {'less' if shorter else 'twice'}"


def weights(path: Path, rng: np.random.Generator) -> str:
    """A number of the data that is not finite, or huge."""
    content = bytearray(path.read_bytes())
    start = _data(_header(bytes(content)))
    at = start + 2 * int(rng.integers((len(content) - start) // 2 - 2))
    bits = [b"\x00\x7c", b"\x00\xfc", b"\x01\x7e", b"\x80\x7f", b"\xc0\x7f", b"\x80\xff", b"\xff\x7b"][rng.integers(7)]
    content[at : at + 2] = bits
    path.write_bytes(content)
    return f"{bits.hex()} written at {at}, among the weights"


def _data(header: _Header) -> int:
    return -(-header.end // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def load(path: Path) -> Model:
    """The model, every weight read."""
    model = load_model(path)
    return dataclasses.replace(model, params=in_memory(model.params))


_EXPECTED: dict[str, tuple[Callable[[Model], Any], Any]] = {
    "block_count": (lambda m: m.spec.n_layers, None),
    "context_length": (lambda m: m.spec.context_length, None),
    "embedding_length": (lambda m: m.spec.d_model, None),
    "feed_forward_length": (lambda m: m.spec.d_ff, None),
    "attention.head_count": (lambda m: m.spec.n_heads, None),
    "attention.head_count_kv": (lambda m: m.spec.n_kv_heads, _HEADS),
    "attention.layer_norm_rms_epsilon": (lambda m: np.float32(m.spec.norm_eps), None),
    "rope.freq_base": (lambda m: np.float32(m.spec.rope.theta), np.float32(10_000)),
    "rope.dimension_count": (lambda m: m.spec.rope.size, _HEAD),
}
"""By key: what the model makes of it, and what llama.cpp takes where a file lacks it."""


def right(path: Path, model: Model) -> bool:
    """Whether sizes, weights and vocabulary are those that gguf reads."""
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    for key, (found, default) in _EXPECTED.items():
        value = fields.get(f"llama.{key}", default)
        value = value[0] if isinstance(value, list) else value
        if found(model) != (np.float32(value) if isinstance(value, float) else value):
            return False
    return _same_positions(fields, model) and _same_weights(reader, model) and _same_vocabulary(fields, model)


def _same_positions(fields: dict[str, Any], model: Model) -> bool:
    rope = {key.removeprefix("llama.rope."): value for key, value in fields.items() if key.startswith("llama.rope.")}
    kind, spec = rope.get("scaling.type", "linear"), model.spec
    factor = 1.0 if kind == "none" else rope.get("scaling.factor", rope.get("scale_linear")) or 1.0
    magnitude = rope.get("scaling.attn_factor", 1.0) * (
        1 + 0.1 * np.log(factor) if kind == "yarn" and factor > 1 else 1
    )
    window = fields.get("llama.attention.sliding_window") or None
    length = rope.get("scaling.original_context_length", spec.context_length)
    return (
        np.isclose(spec.rope.factor, factor)
        and np.isclose(spec.rope.magnitude, magnitude)
        and (spec.rope.yarn.original_context == length if kind == "yarn" else spec.rope.yarn is None)
        and np.isfinite(spec.rope.frequencies(100)).all()
        and spec.window == window
        and fields.get("llama.attention.causal", True)
        and spec.head_size == fields.get("llama.attention.key_length", spec.head_size)
        and spec.head_size == fields.get("llama.attention.value_length", spec.head_size)
    )


def _same_weights(reader: GGUFReader, model: Model) -> bool:
    heads = {"attn_q": model.spec.n_heads, "attn_k": model.spec.n_kv_heads}
    tree = dict(leaves(model.params))
    stored = {t.name: quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    for name, values in stored.items():
        if (count := heads.get(name.split(".")[-2])) is not None:  # neighbours rotate together there
            values = values.reshape(count, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if not np.isfinite(values).all() or not np.array_equal(tree[name], values.astype(np.float32)):
            return False
    return stored.keys() == tree.keys()


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a tree under their GGUF names."""
    for key, part in tree.items():
        if isinstance(part, dict):
            yield from leaves(part, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", np.asarray(part)


def _same_vocabulary(fields: dict[str, Any], model: Model) -> bool:
    if "tokenizer.ggml.tokens" not in fields:
        return model.tokenizer is None
    tokens, tokenizer = fields["tokenizer.ggml.tokens"], model.tokenizer
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if tokenizer.convert_ids_to_tokens(range(len(tokens))) != [t or f"[EMPTY_{i}]" for i, t in enumerate(tokens)]:
        return False
    for role in ("bos", "eos", "unk", "padding"):
        i, token = fields.get(f"tokenizer.ggml.{role}_token_id"), getattr(tokenizer, f"{role[:3]}_token")
        if i not in (None, -1, 2**32 - 1) and (not 0 <= i < len(tokens) or token != tokens[i]):
            return False
    kept = model.metadata
    keys = ["token_type", "scores", "merges", "pre", "model", "add_bos_token", "add_eos_token", "add_space_prefix"]
    for key in (f"tokenizer.ggml.{key}" for key in keys):
        if key in fields and not np.array_equal(kept[key].value, fields[key], equal_nan=False):
            return False
    return all(1 <= kind <= 6 for kind in kinds)


_MUTATIONS: dict[str, Mutation] = {
    **{which: _numbers(which) for which in ("counts", "types", "values", "elements", "sizes", "offsets")},
    **{
        "known keys": known_keys,
        "known keys again": known_keys,
        "text": text,
        "retype": retype,
        "pairs": _records("pairs"),
        "tensors": _records("tensors"),
    },
    **{"array": elements, "weights": weights},
    **raw.of_file(),
    **{f"header {name}": change for name, change in raw.of_file(first=1024).items()},
}

KINDS = (
    Kind("gguf", make, _MUTATIONS, load, right),
    Kind("gguf-sentencepiece", make_sentencepiece, _MUTATIONS, load, right),
)
