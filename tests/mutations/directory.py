"""Hugging Face directories: config, shards with their index, the tokenizer's files."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mutations import Kind, Mutation, objects, raw
from mutations.gguf import leaves, load
from ramp_jax.models import Model
from ramp_jax.models.metadata import plain
from ramp_jax.models.tokenizers import tokenizer_from_gguf

_TEXT = "the king and\n\n  then it's 1234 thing. ÉaŒ日"
_TYPES = "tokenizer.ggml.token_type"
_INDEX = "model.safetensors.index.json"
_COMMON = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def make(folder: Path) -> Path:
    """A tiny Llama 3 in two shards, with a byte-level `tokenizer.json`."""
    folder = folder / "llama"
    folder.mkdir()
    merges = ["Ġ t", "h e", "Ġt he", "i n", "e r", "a n", "in g"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", "<|stop|>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split()) for m in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tokens[:2])
    backend.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {"bos_token": "<|end|>", "eos_token": {"content": "<|stop|>"}})
    _write(folder / "generation_config.json", {"eos_token_id": [1, 0]})
    positions = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokens)} | _COMMON
    config |= {"attention_bias": False, "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 256}
    _write(folder / "config.json", config | {"rope_parameters": positions})
    weights = _drawn("llama", config, torch.float32)
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {name: file for file, part in shards.items() for name in part}
    _write(
        folder / _INDEX, {"metadata": {"total_size": 4 * sum(w.numel() for w in weights.values())}, "weight_map": index}
    )
    return folder


def make_sentencepiece(folder: Path) -> Path:
    """A tiny Phi-3 in one file of bfloat16, with a `tokenizer.model` and rotary positions divided one by one."""
    folder = folder / "phi"
    folder.mkdir()
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name, proto.normalizer_spec.remove_extra_whitespaces = "identity", False
    pieces = ["▁t", "he", "▁the", "in", "er", *"▁abcdefghijklmnopqrstuvwxyz.,"]
    for token, kind in [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]:
        proto.pieces.add(piece=token, score=0.0, type=kind)
    for i, token in enumerate(pieces):
        proto.pieces.add(piece=token, score=-float(i), type=1)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    size = len(proto.pieces) + 1
    added = {str(size - 1): {"content": "<|end|>", "special": True, "rstrip": True}}
    _write(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added})
    positions = {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "short_factor": [1.0 + 0.25 * i for i in range(8)],
        "long_factor": [1.5 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": 128,
    }
    config = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": size} | _COMMON
    config |= {"sliding_window": 64, "max_position_embeddings": 256, "original_max_position_embeddings": 128}
    _write(folder / "config.json", config | {"rope_parameters": positions, "pad_token_id": None})
    save_file(_drawn("phi3", config, torch.bfloat16), folder / "model.safetensors")
    return folder


def make_ranked(folder: Path) -> Path:
    """The same with a `tokenizer.json` in place of the pieces, which merges by ranks and falls back to bytes."""
    folder = make_sentencepiece(folder)
    known = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = {known.id_to_piece(i): i for i in range(known.get_piece_size())}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("e", "r")]
    backend = Tokenizer(models.BPE(tokens, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    return folder


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False))


def _drawn(family: str, config: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    d, ff, vocabulary, head = config["hidden_size"], config["intermediate_size"], config["vocab_size"], 16
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    split = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d)}
    attention = split if family == "llama" else {"qkv_proj": (q + 2 * kv, d)}
    mlp = {"gate_proj": (ff, d), "up_proj": (ff, d)} if family == "llama" else {"gate_up_proj": (2 * ff, d)}
    block = {f"self_attn.{name}": shape for name, shape in (attention | {"o_proj": (d, q)}).items()}
    block |= {f"mlp.{name}": shape for name, shape in (mlp | {"down_proj": (d, ff)}).items()}
    block |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    shapes |= {"model.embed_tokens": (vocabulary, d), "model.norm": (d,), "lm_head": (vocabulary, d)}
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(float(len(shape) == 1), 0.2, shape) for name, shape in shapes.items()}
    return {f"{name}.weight": torch.from_numpy(values).to(dtype) for name, values in drawn.items()}


_POSITIONS = [
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 0.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "mscale": float("nan"), "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": "1"},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "default", "rope_theta": float("nan")},
    {"rope_type": "default", "rope_theta": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": float("inf")},
    {"rope_theta": 5000.0},
    {},
]
_KNOWN: dict[str, list[Any]] = {
    "rope_scaling": _POSITIONS,
    "rope_parameters": _POSITIONS,
    "rope_theta": [0, -1.0, 1.0, 1e30, float("nan"), "5000", {"a": 1}, 123.0],
    "partial_rotary_factor": [0.0, 0.5, 1.5, float("nan"), "1", 1.0],
    "sliding_window": [0, -1, 16, 1e30, "64", [64], None],
    "layer_types": [[], ["full_attention"], ["sliding_attention"] * 2, ["full_attention"] * 2, [[1], 2], "full"],
    "hidden_act": ["gelu", "silu", 1, [], None],
    "attention_bias": [True, False, "no", 1, None],
    "mlp_bias": [True, "", []],
    "quantization_config": [{"quant_method": "gptq"}, {}, "fp8"],
    "num_experts": [0, 8, None, float("nan")],
    "text_config": [{}, {"model_type": "llama"}, [1], None],
    "tie_word_embeddings": [True, False, "yes", 1, None],
    "head_dim": [0, 15, 16, 32, -16, 16.0, 2**31 - 2, None],
    "num_key_value_heads": [0, 1, 2, 3, 4, None, [2, 2]],
    "max_position_embeddings": [0, -1, 2**31, 1e30, 128],
    "rms_norm_eps": [-1e-5, 0, 1e30, float("nan"), "1e-5", 1e-6],
    "vocab_size": [0, 100, 264, 266, 2**31 - 1, 2**31, 1e30],
    "hidden_size": [0, 65, 2**31 - 1, 2**31, "64", None],
    "num_hidden_layers": [0, 1, 3, 512, 2**31, [2]],
    "num_attention_heads": [0, 1, 3, 8, 2**31 - 1],
    "architectures": [[], ["Qwen2ForCausalLM"], ["MistralForCausalLM"], [1], "LlamaForCausalLM", None],
    "model_type": ["qwen2", "mistral", "", None, 7, ["llama"]],
    "torch_dtype": ["int8", 7],
    "auto_map": [{"AutoConfig": "x.Y"}],
}


def known_key(path: Path, rng: np.random.Generator) -> str:
    """A key of config.json that some family reads, with a sound or an odd value, or two of them."""
    config = json.loads((path / "config.json").read_text())
    changed = {}
    for _ in range(rng.integers(1, 3)):
        key = list(_KNOWN)[rng.integers(len(_KNOWN))]
        changed[key] = _KNOWN[key][rng.integers(len(_KNOWN[key]))]
    _write(path / "config.json", config | changed)
    return f"config.json: {changed}"


def _safetensors_header(edit: Callable[[Any, np.random.Generator], str]) -> Mutation:
    """An edit of a shard's header, the data behind it as it was."""

    def change(path: Path, rng: np.random.Generator) -> str:
        shards = sorted(path.glob("*.safetensors"))
        file = shards[rng.integers(len(shards))]
        content = file.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        what = edit(header, rng)
        text = objects.written(header).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        return f"{file.name}: {what}"

    return change


def _one_number(header: Any, rng: np.random.Generator) -> str:
    names = list(header)
    name, key = names[rng.integers(len(names))], ["shape", "data_offsets"][rng.integers(2)]
    if key not in header[name]:
        return "nothing"
    numbers = header[name][key]
    i = rng.integers(len(numbers))
    numbers[i] = [0, 1, -1, numbers[i] + 4, numbers[i] * 2, numbers[i] - 4, 2**31, 2**63, 1.5][rng.integers(9)]
    return f"{key} of {name} = {numbers}"


def _dtype(header: Any, rng: np.random.Generator) -> str:
    names = list(header)
    name = names[rng.integers(len(names))]
    header[name]["dtype"] = ["F32", "F16", "BF16", "I32", "F64", "U8", "F8_E4M3", "X"][rng.integers(8)]
    return f"dtype of {name} = {header[name]['dtype']}"


def _same_data(header: Any, rng: np.random.Generator) -> str:
    names = [name for name in header if name != "__metadata__"]
    one, other = (names[i] for i in rng.choice(len(names), 2, replace=False))
    header[one]["data_offsets"] = header[other]["data_offsets"]
    return f"{one} lies where {other} does"


def _same_name(header: Any, rng: np.random.Generator) -> str:
    names = [name for name in header if name != "__metadata__"]
    alike = [(a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"]]
    one, other = alike[rng.integers(len(alike))]
    header[objects.TWICE + other] = header.pop(one)
    return f"{one} is another {other}"


def weights(path: Path, rng: np.random.Generator) -> str:
    """Numbers that are not finite, or huge, or a whole tensor of another type or shape."""
    file, values = _any_shard(path, rng)
    name = list(values)[rng.integers(len(values))]
    flat = values[name].flatten()
    how = int(rng.integers(6))
    if how == 0:
        values[name] = values[name].to([torch.float64, torch.float16, torch.int8, torch.bool][rng.integers(4)])
    elif how == 1:
        values[name] = values[name][:-1].clone()
    else:
        flat[rng.integers(len(flat))] = [float("nan"), float("inf"), -float("inf"), 1e38][how - 2]
        values[name] = flat.reshape(values[name].shape)
    save_file(values, file)
    return f"{file.name}: {name} changed in way {how}, {values[name].dtype}"


def names(path: Path, rng: np.random.Generator) -> str:
    """A tensor less, under another name, or once more: under another name, or in another shard with other values."""
    file, values = _any_shard(path, rng)
    name = list(values)[rng.integers(len(values))]
    other = ["extra.weight", f"{name}\n", name.replace("layers.0", "layers.1"), f"model.{name}", ""][rng.integers(5)]
    how = ["removed", "renamed", "copied", "in another shard"][rng.integers(4)]
    if how == "in another shard":
        shards = [shard for shard in sorted(path.glob("*.safetensors")) if shard != file]
        target = shards[0] if shards else path / "model-00002-of-00002.safetensors"
        save_file((load_file(target) if shards else {}) | {name: values[name] + 1}, target)
        return f"{name} also in {target.name}, with other values"
    value = values[name] if how == "copied" else values.pop(name)
    if how != "removed":
        values[other] = value.clone()
    save_file(values, file)
    return f"{file.name}: {name} {how} ({other!r})"


def _any_shard(path: Path, rng: np.random.Generator) -> tuple[Path, dict[str, torch.Tensor]]:
    shards = sorted(path.glob("*.safetensors"))
    file = shards[rng.integers(len(shards))]
    return file, load_file(file)


def files(path: Path, rng: np.random.Generator) -> str:
    """A file that is missing, empty, another one, a folder, or one that nobody asked for."""
    found = sorted(path.iterdir())
    file, other = (found[i] for i in rng.choice(len(found), 2, replace=False))
    how = ["missing", "empty", "another", "folder", "beside"][rng.integers(5)]
    if how == "another":
        file.write_bytes(other.read_bytes())
        return f"{file.name} is {other.name}"
    if how == "beside":
        name = ["added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja"]
        file = path / name[rng.integers(4)]
        file.write_bytes([b'{"<x>": 5}', b"[]", b'{"bos_token": 7}', b"\xff", b"{"][rng.integers(5)])
        return f"{file.name} is {file.read_bytes()}"
    file.unlink()
    if how == "empty":
        file.touch()
    elif how == "folder":
        file.mkdir()
    return f"{file.name} {how}"


_NORMALIZERS: list[Any] = [
    {"type": "NFC"},
    {"type": "NFKC"},
    {"type": "Lowercase"},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "StripAccents"}]},
    {"type": "Replace", "pattern": {"String": "king"}, "content": "queen"},
    {"type": "Replace", "pattern": {"Regex": "th+e"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True}]},
    {"type": "None"},
    7,
]
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS: list[Any] = [
    {"type": "Whitespace"},
    {"type": "Digits", "individual_digits": True},
    _BYTE_LEVEL | {"add_prefix_space": True},
    _BYTE_LEVEL | {"use_regex": False},
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    None,
    *(
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
                _BYTE_LEVEL,
            ],
        }
        for pattern in ({"String": "king"}, {"Regex": "kin(g|d)"}, {"Regex": "(a|a|aa)+$"}, {"Regex": "["})
    ),
]


def vocabulary(path: Path, rng: np.random.Generator) -> str:
    """Ids, tokens, merges, added tokens and what is done to texts in a `tokenizer.json`."""
    file = path / "tokenizer.json"
    saved = json.loads(file.read_text())
    model, added = saved["model"], saved["added_tokens"]
    tokens = list(model["vocab"])
    token, other = (tokens[i] for i in rng.choice(len(tokens), 2, replace=False))
    odd_id = [2**31, 2**31 - 1, 2**32, 2**63, -1, 1.5, "1", None, len(tokens), len(tokens) + 3, model["vocab"][other]]
    i = odd_id[rng.integers(len(odd_id))]
    merge = [[token, other], ["no", "such"], ["a"], "a", "a b c", 7, model["merges"][0], ["Ġ", "t"]][rng.integers(8)]
    what = ["id", "hole", "token", "merge", "merges", "added", "normalizer", "pre_tokenizer", "flag"][rng.integers(9)]
    if what == "id":
        model["vocab"][token] = i
    elif what == "hole":
        del model["vocab"][token]
    elif what == "token":
        model["vocab"] = {("Ġthe" * 300 if t == token else t): n for t, n in model["vocab"].items()}
    elif what == "merge":
        model["merges"].insert(int(rng.integers(len(model["merges"]) + 1)), merge)
    elif what == "merges":
        model["merges"] = [[], None, {}, model["merges"] * 2, model["merges"][::-1]][rng.integers(5)]
    elif what == "added":
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        text = [other, "<x>", "", " ", 7][rng.integers(5)]
        added.append({"id": i, "content": text} | flags)
    elif what in ("normalizer", "pre_tokenizer"):
        chosen = _NORMALIZERS if what == "normalizer" else _PRE_TOKENIZERS
        saved[what] = chosen[rng.integers(len(chosen))]
    else:
        key, values = [
            ("dropout", [0.5, 0.0, -1, "a"]),
            ("unk_token", ["no such", token, 7]),
            ("byte_fallback", [True, 1]),
            ("ignore_merges", [True, "yes"]),
            ("continuing_subword_prefix", ["##", ""]),
            ("end_of_word_suffix", ["</w>", ""]),
            ("type", ["Unigram", "WordPiece", "WordLevel", "X", None]),
        ][rng.integers(7)]
        model[key] = values[rng.integers(len(values))]
        what = f"{key} = {model[key]!r}"
    _write(file, saved)
    return f"tokenizer.json: {what} of {token!r}, {other!r}, {i!r}, {merge!r}; {saved.get(what)!r:.60}"


def pieces(path: Path, rng: np.random.Generator) -> str:
    """Pieces, their scores and types, and what is done to texts in a `tokenizer.model`."""
    file = path / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    i, j = (int(n) for n in rng.choice(len(proto.pieces), 2, replace=False))
    what = ["score", "type", "text", "removed", "flag", "special"][rng.integers(6)]
    if what == "score":
        proto.pieces[i].score = [float("nan"), float("inf"), -float("inf"), 1e30, -2.0][rng.integers(5)]
    elif what == "type":
        proto.pieces[i].type = int(rng.integers(1, 7))
    elif what == "text":
        proto.pieces[i].piece = ["", proto.pieces[j].piece, "a" * 3000, "\x00", "▁▁ä"][rng.integers(5)]
    elif what == "removed":
        del proto.pieces[i]
    elif what == "flag":
        flags = ["add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"]
        setattr(proto.normalizer_spec, flags[rng.integers(3)], bool(rng.integers(2)))
    else:
        key = ["bos_id", "eos_id", "unk_id", "model_type"][rng.integers(4)]
        setattr(proto.trainer_spec, key, [1, 2][rng.integers(2)] if key == "model_type" else [-1, 0, 5, 2**30][i % 4])
    file.write_bytes(proto.SerializeToString())
    return f"tokenizer.model: {what} of piece {i} (or {j})"


def right(path: Path, model: Model) -> bool:
    """Whether sizes and positions are those of transformers, weights those of safetensors, ids those of tokenizers."""
    described = json.loads((path / "config.json").read_text())
    kind = described.get("model_type") or {"L": "llama", "P": "phi3"}[described["architectures"][0][0]]
    config = AutoConfig.for_model(**described | {"model_type": kind})
    return _same_sizes(config, model) and _same_weights(path, config, model) and _same_tokenizer(path, config, model)


def _same_sizes(config: Any, model: Model) -> bool:
    spec = model.spec
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_size": head,
        "d_ff": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "norm_eps": float(str(np.float32(config.rms_norm_eps))),
        "tied": config.tie_word_embeddings,
        "window": getattr(config, "sliding_window", None),
    }
    if any(getattr(spec, key) != value for key, value in expected.items()):
        return False
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        inverse, magnitude = config.rope_parameters["rope_theta"] ** (-np.arange(0, head, 2) / head), 1.0
    else:
        inverse, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=16)
    same = np.allclose(spec.rope.frequencies(16), np.asarray(inverse), rtol=1e-4, atol=0)
    return same and bool(np.isclose(spec.rope.magnitude, magnitude, rtol=1e-5))


def _same_weights(path: Path, config: Any, model: Model) -> bool:
    single = path / "model.safetensors"
    shards = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if (path / _INDEX).is_file():
        shards = sorted({path / name for name in json.loads((path / _INDEX).read_text())["weight_map"].values()})
    stored: dict[str, torch.Tensor] = {}
    for shard in shards:
        held = load_file(shard)
        if stored.keys() & held.keys():
            return False
        stored |= held
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "phi3": gguf.MODEL_ARCH.PHI3}[config.model_type]
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    named = {table.get_name(name, try_suffixes=(".weight", ".bias")): w.float().numpy() for name, w in stored.items()}
    tree = dict(leaves(model.params))
    if (
        model.spec.tied
        and "output.weight" in named
        and np.array_equal(named["output.weight"], named["token_embd.weight"])
    ):
        del named["output.weight"]
    same = tree.keys() == named.keys() and all(np.array_equal(tree[name], w) for name, w in named.items())
    return same and all(np.isfinite(w).all() for w in tree.values())


def _same_tokenizer(path: Path, config: Any, model: Model) -> bool:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return model.tokenizer is None
    tokens = model.metadata["tokenizer.ggml.tokens"].value
    if len(tokens) != config.vocab_size or len(set(tokens)) != len(tokens):
        return False
    found = model.tokenizer.encode(_TEXT, add_special_tokens=False)
    in_a_file = tokenizer_from_gguf(plain(model.metadata), path).encode(_TEXT, add_special_tokens=False)
    if (path / "tokenizer.json").is_file():
        known = Tokenizer.from_file(str(path / "tokenizer.json"))
        known.add_tokens(_listed(path))
        by_id = {i: token for token, i in known.get_vocab(with_added_tokens=True).items()}
        expected = known.encode(_TEXT, add_special_tokens=False).ids
    else:
        known = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        by_id = {i: known.id_to_piece(i) for i in range(known.get_piece_size())}
        by_id = {i: token for i, token in by_id.items() if token}
        expected = known.encode(_TEXT)
        if any(known.is_unused(i) or model.metadata[_TYPES].value[i] == 4 for i in range(known.get_piece_size())):
            expected = (
                found  # SentencePiece joins those and splits them again, llama.cpp looks for them before anything
            )
    return in_a_file == found == expected and all(tokens[i] == token for i, token in by_id.items())


def _listed(path: Path) -> list[AddedToken]:
    config = path / "tokenizer_config.json"
    listed = json.loads(config.read_text()).get("added_tokens_decoder") if config.is_file() else None
    texts = [token["content"] if isinstance(token, dict) else token for token in (listed or {}).values()]
    return [AddedToken(text, normalized=False) for text in texts]


_SHARED: dict[str, Mutation] = {
    "known key": known_key,
    "known key again": known_key,
    **objects.of_file("config.json"),
    **objects.of_file("tokenizer_config.json"),
    **{f"header {name}": _safetensors_header(edit) for name, edit in objects.EDITS.items()},
    "header number": _safetensors_header(_one_number),
    "header dtype": _safetensors_header(_dtype),
    "header same name": _safetensors_header(_same_name),
    "header same data": _safetensors_header(_same_data),
    "weights": weights,
    "names": names,
    "files": files,
    **raw.of_file("config.json"),
}
_TOKENIZER_TOO: dict[str, Mutation] = {
    "vocabulary": vocabulary,
    "vocabulary again": vocabulary,
    **objects.of_file("tokenizer.json"),
    **raw.of_file("tokenizer.json"),
}
_BYTE_LEVEL_TOO: dict[str, Mutation] = {
    **_TOKENIZER_TOO,
    **objects.of_file("generation_config.json"),
    **objects.of_file(_INDEX),
    **raw.of_file("model-00001-of-00002.safetensors", first=4096),
}
_PIECES_TOO: dict[str, Mutation] = {
    "pieces": pieces,
    "pieces again": pieces,
    **raw.of_file("tokenizer.model"),
    **raw.of_file("model.safetensors"),
}

KINDS = (
    Kind("directory", make, _SHARED | _BYTE_LEVEL_TOO, load, right),
    Kind("directory-sentencepiece", make_sentencepiece, _SHARED | _PIECES_TOO, load, right),
    Kind("directory-ranked", make_ranked, _SHARED | _TOKENIZER_TOO, load, right),
)
