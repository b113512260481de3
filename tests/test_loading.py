"""Which files make up a model, what of them is refused, and that nothing is lost on the way into memory."""

import contextlib
import json
import logging
import shutil
import struct
import sys
from pathlib import Path
from unittest.mock import MagicMock

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType, GGUFValueType
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.flax import save_file as save_flax
from safetensors.numpy import load_file, save_file

from ramp_jax.allocation import Allocation
from ramp_jax.halo import libggml
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import load_model, save_model, source
from ramp_jax.models.gguf_header import read_header
from ramp_jax.models.gguf_source import open_gguf
from ramp_jax.models.metadata import KeyValue, plain, typed
from ramp_jax.models.spec import describe

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks import loading
from benchmarks.synthetic import write_checkpoint

INDEX = "model.safetensors.index.json"
DEQUANTIZED = [
    kind
    for kind in GGMLQuantizationType
    if kind.name not in ("Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64", "F32", "F16", "BF16")
]


@pytest.fixture(scope="session")
def weights(untied_directory):
    """Values of the tiny model by their Hugging Face names; do not modify."""
    return load_file(untied_directory / "model.safetensors")


@pytest.fixture
def make(tmp_path, untied_directory):
    """Write a directory without a tokenizer: ({file: values}, index, **config) → its path."""

    def write(files, index=None, **config):
        values = json.loads((untied_directory / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(values))
        for name, tensors in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            save_file(tensors, tmp_path / name)
        if index is not None:
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
        return str(tmp_path)

    return write


@pytest.fixture
def gguf_file(tmp_path, untied):
    return tiny.write_gguf(tmp_path / "tiny.gguf", untied.metadata, tiny.gguf_values(tied=False))


def halves(values):
    """Two shards and the index that says so."""
    names = list(values)
    parts = {"a-1.safetensors": names[: len(names) // 2], "a-2.safetensors": names[len(names) // 2 :]}
    files = {file: {name: values[name] for name in part} for file, part in parts.items()}
    return files, {name: file for file, part in parts.items() for name in part}


def same(actual, expected):
    assert jax.tree.structure(actual.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)


def zeros(values):
    return {name: np.zeros_like(value) for name, value in values.items()}


def test_index_decides(make, weights, untied):
    files, index = halves(weights)
    path = make(files | {"model.safetensors": zeros(weights), "z.safetensors": zeros(weights)}, index)
    same(load_model(path), untied)


@pytest.mark.parametrize(
    "beside", ["consolidated.safetensors", "adapter_model.safetensors", "original/model.safetensors"]
)
@pytest.mark.parametrize("name", ["model.safetensors", "model-1.safetensors", "weights.safetensors"])
def test_files_beside_a_model(make, weights, untied, name, beside):
    same(load_model(make({name: weights, beside: zeros(weights)})), untied)


@pytest.mark.parametrize("name", ["../a-1.safetensors", "/tmp/a-1.safetensors", "sub/a-1.safetensors", "..", "a-1.bin"])
def test_index_that_leads_elsewhere(make, weights, name):
    files, index = halves(weights)
    with pytest.raises(ValueError, match=r"names '.*'; a shard has to be a \.safetensors in the same folder"):
        load_model(make(files, index | {"model.norm.weight": name}))


def test_index_whose_shard_is_missing(make, weights):
    files, index = halves(weights)
    with pytest.raises(FileNotFoundError, match=r"lacks a-2\.safetensors, which model\.safetensors\.index\.json names"):
        load_model(make({"a-1.safetensors": files["a-1.safetensors"]}, index))


def test_index_with_a_tensor_that_its_shard_lacks(make, weights):
    files, index = halves(weights)
    del files["a-2.safetensors"]["model.norm.weight"]
    with pytest.raises(ValueError, match=r"a-2\.safetensors lacks model\.norm\.weight"):
        load_model(make(files, index))


def test_tensor_in_two_shards(make, weights):
    files, index = halves(weights)
    files["a-1.safetensors"] |= {"model.norm.weight": weights["model.norm.weight"]}
    with pytest.raises(ValueError, match=r"a-1\.safetensors holds model\.norm\.weight, which .* puts in a-2"):
        load_model(make(files, index))


def test_tensor_in_two_files_without_an_index(make, weights):
    files = {"model-1.safetensors": weights, "model-2.safetensors": {"model.norm.weight": np.ones(64, np.float32)}}
    with pytest.raises(ValueError, match=r"model-2.* and .*model-1\.safetensors both hold model\.norm\.weight"):
        load_model(make(files))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "[" * 99_999])
def test_index_that_is_damaged(make, weights, tmp_path, content):
    path = make({"model.safetensors": weights})
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json (has no weight_map|is no JSON file|holds a JSON list)"):
        load_model(path)


def test_shard_that_no_index_lists_but_the_others_count(make, weights):
    first, last = halves(weights)[0].values()
    files = {"model-00001-of-00003.safetensors": first, "model-00003-of-00003.safetensors": last}
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00003\.safetensors; download the rest"):
        load_model(make(files))


def test_files_of_which_any_could_be_the_model(make, weights):
    with pytest.raises(
        ValueError, match=r"holds a\.safetensors, b\.safetensors and no model\.safetensors\.index\.json"
    ):
        load_model(make({"a.safetensors": weights, "b.safetensors": weights}))


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model.", "text.decoder."])
def test_decoder_under_another_prefix(make, weights, untied, prefix):
    head = prefix.removesuffix("model.") if prefix.startswith("language_model.") else ""
    renamed = {
        head + name if name == "lm_head.weight" else prefix + name.removeprefix("model."): value
        for name, value in weights.items()
    }
    same(load_model(make({"model.safetensors": renamed})), untied)


TOWER = {
    "model.vision_tower.patch.weight": np.ones((2, 3), np.float32),
    "model.vision_tower.embed_tokens.weight": np.ones((2, 3), np.float32),
    "multi_modal_projector.linear.weight": np.ones((2, 3), np.float32),
}


def test_tower_is_left_out_and_named(make, weights, untied, caplog):
    path = make({"model.safetensors": weights | TOWER}, vision_config={"hidden_size": 3})
    with caplog.at_level(logging.WARNING):
        same(load_model(path), untied)
    assert "only its text decoder is loaded; left out: multi_modal_projector, vision_tower." in caplog.text


def test_tower_that_the_config_does_not_have(make, weights):
    with pytest.raises(ValueError, match=r"does not use: model\.vision_tower\.embed_tokens\.weight"):
        load_model(make({"model.safetensors": weights | TOWER}))


def test_tower_excuses_no_tensor_of_the_decoder(make, weights):
    extra = {"model.layers.0.cross_attn.q_proj.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"does not use: model\.layers\.0\.cross_attn\.q_proj\.weight\."):
        load_model(make({"model.safetensors": weights | TOWER | extra}, vision_config={}))


def test_head_that_copies_the_embedding(make, tied_directory, tied, tmp_path):
    values = load_file(tied_directory / "model.safetensors")
    embedding = values["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    same(
        load_model(
            make({"model.safetensors": values | buffer | {"lm_head.weight": embedding}}, tie_word_embeddings=True)
        ),
        tied,
    )
    other = embedding.copy()
    other[-1, -1] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(make({"model.safetensors": values | {"lm_head.weight": other}}, tie_word_embeddings=True))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights(make, tmp_path, name):
    path = make({})
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match=rf"{name} is pickled, which can run code.*save_pretrained"):
        load_model(path)
    with pytest.raises(ValueError, match=rf"{name} is pickled, which can run code.*save_pretrained"):
        load_model(tmp_path / name)


def test_one_file_of_a_directory(make, weights, tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors is one file of a model; name its folder, "):
        load_model(make({"model.safetensors": weights}) + "/model.safetensors")


def test_folder_of_other_things(make, tmp_path):
    path = make({"adapter_model.safetensors": {"a": np.ones(1, np.float32)}})
    with pytest.raises(FileNotFoundError, match=r"holds an adapter \(adapter_model\.safetensors\), no model"):
        load_model(path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"holds x\.gguf; name the file"):
        load_model(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX, "x.gguf"])
def test_git_lfs_pointers(make, weights, tmp_path, name):
    path = make({"model.safetensors": weights})
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13648208\n")
    with pytest.raises(ValueError, match=r"is a Git-LFS pointer, not the file itself; run `git lfs pull`"):
        load_model(str(tmp_path / name) if name == "x.gguf" else path)


def test_matrix_of_integers(make, weights):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"{name} is stored as I8; use the checkpoint in one of F64, F32, F16, BF16"):
        load_model(make({"model.safetensors": weights | {name: weights[name].astype(np.int8)}}))


def test_directory_without_a_config(make, weights, tmp_path):
    path = make({"model.safetensors": weights})
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not a model directory: it lacks config\.json"):
        load_model(path)


def test_config_is_judged_before_the_weights(make, tmp_path):
    path = make({}, architectures=["BloomForCausalLM"])
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="BloomForCausalLM is not supported"):
        load_model(path)


@pytest.mark.parametrize("content", ["[]", "{", '"x"', "[" * 99_999, "\xff"])
def test_config_that_is_no_object(make, weights, tmp_path, content):
    path = make({"model.safetensors": weights})
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json (is no JSON file|holds a JSON)"):
        load_model(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_truncated_safetensors(make, weights, tmp_path, share):
    path, file = make({"model.safetensors": weights}), tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors is a damaged safetensors file"):
        load_model(path)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_go_straight_into_their_dtype(make, weights, tmp_path, untied, monkeypatch, stored, dtype):
    monkeypatch.setattr(source, "_PIECE", 1000)
    kept = {name: value.astype(jnp.dtype(stored)) for name, value in weights.items()}
    from_directory = load_model(make({"model.safetensors": kept}), dtype)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[stored]
    values = tiny.gguf_values(tied=False)
    types = dict.fromkeys(values, GGMLQuantizationType[kind])
    from_gguf = load_model(str(tiny.write_gguf(tmp_path / "a.gguf", untied.metadata, values, types)), dtype)
    expected = jax.tree.map(lambda w: np.asarray(w).astype(jnp.dtype(stored)).astype(np.float32), untied.params)
    for model in (from_directory, from_gguf):
        for actual, w in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected), strict=True):
            assert actual.dtype == (dtype if w.ndim == 2 else "float32")
            np.testing.assert_array_equal(actual, w.astype(actual.dtype))


@pytest.mark.parametrize("dtype", ["float33", "int8", "float64"])
def test_dtypes_that_matrices_cannot_have(gguf_file, dtype):
    with pytest.raises(ValueError, match=r"choose auto, stored or one of float32, bfloat16, float16"):
        load_model(str(gguf_file), dtype)


@pytest.mark.parametrize("name", ["sha256-0123abcd", "M.GGUF", "模型 ü.gguf", "model.bin"])
def test_gguf_is_known_by_its_magic(gguf_file, untied, name):
    same(load_model(str(gguf_file.rename(gguf_file.with_name(name)))), untied)


def test_header_is_what_gguf_reads(gguf_file):
    header, reader = read_header(gguf_file), gguf.GGUFReader(gguf_file)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert plain(header.metadata) == {name: field.contents() for name, field in fields.items()}
    assert [pair.type for pair in header.metadata.values()] == [field.types[0] for field in fields.values()]
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        stored = header.tensors[tensor.name]
        assert (stored.offset, stored.n_bytes, stored.type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert stored.shape == tuple(tensor.shape[::-1])


def test_every_type_of_metadata(tmp_path):
    values = {
        GGUFValueType.UINT8: 200,
        GGUFValueType.INT8: -100,
        GGUFValueType.UINT16: 60_000,
        GGUFValueType.INT16: -30_000,
        GGUFValueType.UINT32: 1 << 31,
        GGUFValueType.INT32: -(1 << 31),
        GGUFValueType.FLOAT32: 0.5,
        GGUFValueType.BOOL: True,
        GGUFValueType.STRING: "模型",
        GGUFValueType.UINT64: 1 << 63,
        GGUFValueType.INT64: -(1 << 62),
        GGUFValueType.FLOAT64: 0.1,
    }
    pairs = {f"a.{kind.name}": KeyValue(value, kind) for kind, value in values.items()}
    pairs |= {f"b.{kind.name}": KeyValue([value] * 3, GGUFValueType.ARRAY, kind) for kind, value in values.items()}
    architecture = typed({"general.architecture": "llama"})
    path = tiny.write_gguf(tmp_path / "a.gguf", architecture | pairs, {"a": np.ones(3, np.float32)})
    assert read_header(path).metadata == architecture | pairs


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_every_type_that_gguf_dequantizes(tmp_path, rng, monkeypatch, kind):
    """Those that are not written here among them: the same weights as ggml's own."""
    monkeypatch.setattr(source, "_PIECE", 600)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (5, 256 // block * size), np.uint8)
    while (bad := ~np.isfinite(libggml.dequantize(kind.name, raw)).all(1)).any():
        raw[bad] = rng.integers(0, 256, raw[bad].shape, np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a.weight", raw, raw_dtype=kind)
    writer.add_tensor("b.weight", raw[0], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, expected = open_gguf(tmp_path / "a.gguf"), libggml.dequantize(kind.name, raw)
    with np.errstate(all="ignore"):
        assert found.shapes == {"a.weight": (5, 256), "b.weight": (256,)}
        np.testing.assert_array_equal(found.read("a.weight", np.float32), expected)
        np.testing.assert_array_equal(found.read("a.weight", np.float32, slice(2, 4)), expected[2:4])
        np.testing.assert_array_equal(found.read("b.weight", np.float32), expected[0])


def test_type_that_gguf_does_not_dequantize(tmp_path, untied):
    values = tiny.gguf_values(tied=False)
    name = "blk.1.ffn_up.weight"
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, pair in untied.metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, pair.value, pair.type, pair.sub_type)
    for key, value in values.items():
        writer.add_tensor(key, value.astype(np.int16) if key == name else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight is I16, which cannot be dequantized here"):
        load_model(str(path))


def test_type_that_gguf_does_not_know(tmp_path, untied):
    """Q2_0, which llama.cpp has."""
    name = "blk.1.ffn_up.weight"
    path = tiny.write_gguf(tmp_path / "a.gguf", untied.metadata, tiny.gguf_values(tied=False))
    raw = path.read_bytes()
    kind = raw.index(name.encode()) + len(name) + struct.calcsize("<IQQ")  # behind rank and shape
    path.write_bytes(raw[:kind] + struct.pack("<I", 42) + raw[kind + 4 :])
    with pytest.raises(ValueError, match=rf"{name} has type 42, which gguf does not know; use another file"):
        load_model(str(path))


def split(number, count, tensors):
    return {
        "split.no": KeyValue(number, GGUFValueType.UINT16),
        "split.count": KeyValue(count, GGUFValueType.UINT16),
        "split.tensors.count": KeyValue(tensors, GGUFValueType.INT32),
    }


@pytest.fixture
def parts(tmp_path, untied):
    """A GGUF in three files, the pairs alone in the first, as llama-gguf-split writes it when asked to."""
    values = tiny.gguf_values(tied=False)
    names = list(values)
    cut = [[], names[:7], names[7:]]
    paths = []
    for i, part in enumerate(cut):
        pairs = (untied.metadata if i == 0 else typed({"general.architecture": "llama"})) | split(i, 3, len(names))
        path = tmp_path / f"m-{i + 1:05d}-of-00003.gguf"
        paths.append(tiny.write_gguf(path, pairs, {name: values[name] for name in part}))
    return paths


@pytest.mark.parametrize("part", [0, 1, 2])
def test_split_gguf_opens_from_any_part(parts, untied, part):
    model = load_model(str(parts[part]))
    same(model, untied)
    assert not [name for name in model.metadata if name.startswith("split.")]


def test_split_gguf_without_a_part(parts):
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks m-00002-of-00003\.gguf; download the rest"):
        load_model(str(parts[2]))


def test_part_under_another_name(parts):
    with pytest.raises(ValueError, match=r"holds 7 tensors of a model in 3 files; give them their names"):
        load_model(str(parts[1].rename(parts[1].with_name("b.gguf"))))


def test_part_twice(parts):
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ValueError, match=r"two parts of .* hold .*blk\.0\.attn_k\.weight"):
        load_model(str(parts[0]))


def test_whole_file_that_says_it_is_a_part(tmp_path, untied):
    values = tiny.gguf_values(tied=False)
    path = tiny.write_gguf(tmp_path / "whole.gguf", untied.metadata | split(0, 2, len(values)), values)
    model = load_model(str(path))
    same(model, untied)
    assert not [name for name in model.metadata if name.startswith("split.")]


def test_big_endian_file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"is big-endian; convert it with `gguf-convert-endian .* little`"):
        load_model(str(tmp_path / "b.gguf"))


def pair(name, kind, body):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (pair("a", 9, struct.pack("<IQ", 4, 1 << 31)), "a is an array of 2,147,483,648"),
        (pair("a", 9, struct.pack("<IQ", 8, 1 << 23)), "ends inside its header"),
        (pair("a", 9, struct.pack("<IQ", 4, 1 << 23)), "ends inside its header"),
        (pair("a", 8, struct.pack("<Q", 1 << 62)), "ends inside its header"),
        (pair("a", 99, b""), "a has type 99"),
        (pair("a", 8, struct.pack("<Q", 1) + b"\xff"), "a is no UTF-8"),
        (pair("a", 4, b"0000") * 2, "it holds a twice"),
        (pair("a", 7, b"\2"), "a is neither true nor false"),
        (pair("a\n", 4, b"0000"), r"a field is called 'a\\n'"),
        (struct.pack("<Q", 1 << 63), "ends inside its header"),
    ],
)
def test_header_that_promises_too_much(tmp_path, body, reason):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + body)
    with pytest.raises(ValueError, match=rf"not a whole GGUF file \(.*{reason}"):
        load_model(str(path))


@pytest.mark.parametrize("counts", [(1 << 31, 0), (0, 1 << 63)])
def test_counts_that_no_model_has(tmp_path, counts):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
    with pytest.raises(ValueError, match=r"it says that it holds [\d,]+ tensors and [\d,]+ fields"):
        load_model(path)


def test_bytes_behind_the_last_tensor(gguf_file):
    with gguf_file.open("ab") as file:
        file.write(bytes(33))
    with pytest.raises(ValueError, match="33 bytes follow its last tensor"):
        load_model(gguf_file)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_named_before_anything_else(make, weights, untied, tmp_path, bad, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = weights[name].copy()
    broken[-1, -1] = bad
    save_flax({key: jnp.asarray(value, dtype) for key, value in (weights | {name: broken}).items()}, tmp_path / "m")
    path = make({"model.safetensors": weights})
    (tmp_path / "m").rename(tmp_path / "model.safetensors")
    for wanted in ("float32", "bfloat16"):
        with pytest.raises(
            ValueError, match=rf"model\.safetensors: {name} holds values that are NaN or infinite; down"
        ):
            load_model(path, wanted)
    on_disk = load_model(path, resident=False)
    on_disk.params["blk"][0]
    with pytest.raises(ValueError, match=f"{name} holds values that are NaN or infinite"):
        on_disk.params["blk"][1]
    values = tiny.gguf_values(tied=False) | {"blk.1.ffn_up.weight": broken}
    with pytest.raises(ValueError, match=r"a\.gguf: blk\.1\.ffn_up\.weight holds values that are NaN or infinite"):
        load_model(tiny.write_gguf(tmp_path / "a.gguf", untied.metadata, values))


def test_type_code_that_makes_weights_infinite(gguf_file):
    content = bytearray(gguf_file.read_bytes())
    found = read_header(gguf_file).tensors
    last = list(found)[-1]
    at = content.index(last.encode()) + len(last) + 4 + 8 * len(found[last].shape)
    content[at : at + 4] = struct.pack("<I", GGMLQuantizationType.I32)
    gguf_file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{last} is I32, which cannot be dequantized"):
        load_model(gguf_file)


def test_sizes_are_held_against_tensors_before_a_tokenizer_fills_them(make, weights, untied_directory, tmp_path):
    path = make({"model.safetensors": weights}, vocab_size=2**31 - 1)
    shutil.copy(untied_directory / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match=r"token_embd\.weight .* has shape \(320, 64\), expected \(2147483647, 64\)"):
        load_model(path)


def test_name_that_stands_in_a_shard_twice(make, weights, tmp_path):
    path, file = make({"model.safetensors": weights}), tmp_path / "model.safetensors"
    content = file.read_bytes()
    one, other = b"layers.1.input_layernorm", b"layers.0.input_layernorm"
    assert content.count(one) == 1
    file.write_bytes(content.replace(one, other))
    with pytest.raises(ValueError, match=r"model\.safetensors is a damaged safetensors file \(.*invalid offset"):
        load_model(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1, "a": 2}', "two values of 'a'"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "more than 64 levels"),
        (r'{"a": "\ud800"}', "surrogates not allowed"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
    ],
)
def test_json_that_readers_read_differently(make, weights, tmp_path, content, reason):
    path = make({"model.safetensors": weights})
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json is no JSON file \(.*{reason}.*\); download or save it again"):
        load_model(path)


def test_json_of_a_size_that_none_has(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_LARGEST", 10)
    (tmp_path / "a.json").write_text('{"a": "123456"}')
    with pytest.raises(ValueError, match=r"a\.json has 15 bytes, at most 10 were expected"):
        source.read_json(tmp_path / "a.json")


def test_too_little_memory_is_no_traceback(gguf_file, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("ramp_jax.models.load.in_memory", full)
    with pytest.raises(OSError, match=r"tiny\.gguf needs more memory than there is; free some"):
        load_model(gguf_file)


def test_arrays_of_arrays_and_other_versions(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("a.b", 9, struct.pack("<IQ", 9, 0)))
    with pytest.raises(ValueError, match=r"a\.b is an array of arrays"):
        load_model(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ValueError, match="version 1, not of 2 or 3"):
        load_model(str(path))


def test_damage_anywhere_in_a_header_is_an_error_of_the_file(gguf_file, rng):
    """Whatever a byte becomes: the file loads, or one sentence says what is wrong with it."""
    whole = gguf_file.read_bytes()
    end = min(tensor.offset for tensor in read_header(gguf_file).tensors.values())
    structure = [i for i in range(end) if not chr(whole[i]).isalnum()]
    for i in [*range(24), *rng.choice(structure, 120)]:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << rng.integers(8)
        gguf_file.write_bytes(damaged)
        with contextlib.suppress(ValueError, OSError):
            load_model(str(gguf_file))


def test_empty_array_is_carried(tmp_path, untied):
    pairs = untied.metadata | {"general.tags": KeyValue(["z" * 24], GGUFValueType.ARRAY, GGUFValueType.STRING)}
    path = tiny.write_gguf(tmp_path / "a.gguf", pairs, tiny.gguf_values(tied=False))
    raw = path.read_bytes()
    at = raw.index(b"general.tags") + len("general.tags") + 8
    path.write_bytes(raw[:at] + struct.pack("<Q", 0) + raw[at + 8 + 32 :])
    model = load_model(str(path))
    same(model, untied)
    allocation = Allocation.uniform(model, "F32")
    assert export_gguf(model, allocation, tmp_path / "out.gguf") == allocation.file_bytes
    carried = load_model(str(tmp_path / "out.gguf")).metadata["general.tags"]
    assert carried == model.metadata["general.tags"] == KeyValue([], GGUFValueType.ARRAY, GGUFValueType.STRING)


def test_vocabulary_of_another_file(make, weights, gguf_file, untied, tmp_path):
    path = make({"model.safetensors": weights})
    assert load_model(path).tokenizer is None
    model = load_model(path, tokenizer_from=str(gguf_file))
    assert model.tokenizer.encode("Tokens of a text") == untied.tokenizer.encode("Tokens of a text")
    own = {name: value for name, value in plain(untied.metadata).items() if name.startswith("tokenizer.")}
    assert {name: value for name, value in plain(model.metadata).items() if name.startswith("tokenizer.")} == own
    same(load_model(str(gguf_file), tokenizer_from=str(gguf_file)), untied)


def test_vocabularies_that_are_longer_or_shorter(make, weights, gguf_file, tmp_path):
    short = weights | {name: weights[name][:100] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(
        ValueError, match=r"has a vocabulary of 320 tokens, the model one of 100; name a GGUF of the same"
    ):
        load_model(make({"model.safetensors": short}, vocab_size=100), tokenizer_from=str(gguf_file))
    rows = {name: np.resize(weights[name], (330, 64)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    model = load_model(make({"model.safetensors": weights | rows}, vocab_size=330), tokenizer_from=str(gguf_file))
    pairs = plain(model.metadata)
    assert pairs["tokenizer.ggml.tokens"][319:322] == [
        plain(read_header(gguf_file).metadata)["tokenizer.ggml.tokens"][-1],
        "[PAD320]",
        "[PAD321]",
    ]
    assert pairs["tokenizer.ggml.token_type"][320:] == [gguf.TokenType.UNUSED] * 10
    assert len(pairs["tokenizer.ggml.tokens"]) == 330


def test_folder_in_place_of_a_vocabulary(gguf_file, tmp_path):
    with pytest.raises(ValueError, match="is no GGUF; name one with --tokenizer_from"):
        load_model(gguf_file, tokenizer_from=tmp_path)


def test_file_without_a_vocabulary(make, weights, tmp_path):
    path = tiny.write_gguf(tmp_path / "a.gguf", typed({"general.architecture": "llama"}), {"a": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"a\.gguf holds no vocabulary; name another GGUF with --tokenizer_from"):
        load_model(make({"model.safetensors": weights}), tokenizer_from=str(path))


REPOSITORY = (
    "README.md",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "training_args.bin",
    "original/consolidated.00.pth",
    "original/params.json",
    "checkpoint-5/config.json",
    "onnx/model.safetensors",
    "model.fp8/model-1.safetensors",
    "adapter_model.safetensors",
)


@pytest.fixture
def hub(monkeypatch):
    """A hub whose answer a test chooses: answers(*results, one per call), and the keywords of the calls."""
    calls = []

    def answers(*results):
        left = iter(results)

        def download(ref, **keywords):
            calls.append(keywords)
            result = next(left)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return calls

    return answers


def test_what_is_downloaded_and_how_it_is_called(hub, untied_directory, tmp_path):
    snapshot = tmp_path / "models--owner--Tiny-1.5B" / "snapshots" / ("a" * 40)
    shutil.copytree(untied_directory, snapshot)
    calls = hub(str(snapshot))
    assert load_model("owner/Tiny-1.5B").metadata["general.name"].value == "Tiny 1.5B"
    assert list(filter_repo_objects(REPOSITORY, **calls[0])) == list(REPOSITORY[1:12])


@pytest.mark.parametrize(
    ("called", "size"),
    [
        ("SmolLM2-135M-Instruct", "135M"),
        ("Llama-3.2-1B", "1B"),
        ("Qwen2.5-7b-instruct-v2", "7B"),
        ("tiny", "130K"),
        ("Ünïcode model", "130K"),
    ],
)
def test_general_pairs_are_those_of_llama_cpp_s_converter(untied_directory, tmp_path, called, size):
    """By the rules of gguf's own reader of model folders, for a model that is as large as its name says."""
    folder = shutil.copytree(untied_directory, tmp_path / called)
    parameters = {"130K": 130_000, "135M": 134_515_008, "1B": 1_235_814_400, "7B": 7_615_616_512}[size]
    pairs = plain(describe(load_model(folder).spec, "name", parameters, called))
    expected = gguf.Metadata.load(None, folder, None, parameters)
    assert pairs["general.type"] == "model"
    assert pairs["general.size_label"] == size == (expected.size_label or size)
    for name in ("basename", "finetune", "version"):
        assert pairs.get(f"general.{name}") == getattr(expected, name), name
    assert load_model(folder).metadata["general.name"].value == expected.name


def test_cached_snapshot_where_the_hub_is_not_reached(hub, untied_directory):
    calls = hub(ConnectionError(), str(untied_directory))
    assert load_model("owner/name").tokenizer is not None
    assert calls[1]["local_files_only"]


def response(error):
    return error("no", response=MagicMock(headers={}))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (LocalEntryNotFoundError("offline"), r"did not deliver it \(LocalEntryNotFoundError\), nor is it in the cache"),
        (response(GatedRepoError), r"only to who has accepted its terms"),
    ],
)
def test_hub_that_does_not_deliver(hub, answer, message):
    hub(answer, answer)
    with pytest.raises(FileNotFoundError, match=message):
        load_model("owner/name")


def test_memory_while_loading_is_little_more_than_the_model(tmp_path):
    """In a process of its own, a sharded bf16 model of 94 million weights."""
    write_checkpoint(tmp_path / "big", loading.llama_spec(512))
    assert loading.loaded("shards", tmp_path / "big", "float32")["peak_over_bytes"] < 1.25


def test_too_little_memory_is_said_before_anything_is_read(gguf_file, untied, monkeypatch):
    monkeypatch.setattr("ramp_jax.resources.available_memory", lambda: 1000)
    monkeypatch.setattr("ramp_jax.models.gguf_source.GgufSource.read", None)
    needed = sum(w.nbytes for w in jax.tree.leaves(untied.params))
    with pytest.raises(
        OSError, match=rf"tiny\.gguf in float32 needs {needed:,} bytes of memory, and 1,000 are available"
    ):
        load_model(str(gguf_file))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_dtype_of_the_checkpoint_is_kept_where_that_is_wanted(make, weights, stored):
    low = {name: jnp.asarray(value, stored) for name, value in weights.items()}
    path = make({})
    save_flax(low, Path(path) / "model.safetensors")
    model = load_model(path, "stored")
    assert model.params["token_embd"]["weight"].dtype == stored
    np.testing.assert_array_equal(model.params["token_embd"]["weight"], low["model.embed_tokens.weight"])


def test_checkpoint_of_several_dtypes_is_float32(gguf_file, make, weights):
    path = make({})
    low = {name: jnp.asarray(value, "bfloat16" if "mlp" in name else "float16") for name, value in weights.items()}
    save_flax(low, Path(path) / "model.safetensors")
    assert load_model(path, "stored").params["token_embd"]["weight"].dtype == "float32"
    assert load_model(gguf_file, "stored").params["token_embd"]["weight"].dtype == "float32"


def test_values_beyond_float16_are_named(make, weights, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    path = make({"model.safetensors": {**weights, name: weights[name] * 1e6}})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that float16 cannot"):
        load_model(path, "float16")
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight holds values that float16 cannot"):
        save_model(load_model(path), tmp_path / "half", "float16")
    assert not (tmp_path / "half").exists()


def test_pairs_of_other_types_are_written_as_llama_cpp_reads_them(tmp_path, untied):
    """Counts as u64, floats as f64, ids as i32 or out of range, flags as numbers."""
    odd = {
        "llama.block_count": KeyValue(3, GGUFValueType.UINT64),
        "llama.rope.freq_base": KeyValue(5000.0, GGUFValueType.FLOAT64),
        "llama.attention.head_count_kv": KeyValue([2, 2, 2], GGUFValueType.ARRAY, GGUFValueType.INT32),
        "llama.rope.scale_linear": KeyValue(1.0, GGUFValueType.FLOAT32),
        "tokenizer.ggml.bos_token_id": KeyValue(0, GGUFValueType.INT32),
        "tokenizer.ggml.padding_token_id": KeyValue(-1, GGUFValueType.INT32),
        "tokenizer.ggml.unknown_token_id": KeyValue(2**32 - 1, GGUFValueType.UINT32),
        "tokenizer.ggml.add_bos_token": KeyValue(0, GGUFValueType.UINT32),
    }
    path = tiny.write_gguf(tmp_path / "a.gguf", untied.metadata | odd, tiny.gguf_values(tied=False))
    model = load_model(path)
    same(model, untied)
    expected = {name: untied.metadata[name] for name in odd if name in untied.metadata}
    assert {name: model.metadata.get(name) for name in odd if name in model.metadata} == expected
    assert "tokenizer.ggml.padding_token_id" not in model.metadata
