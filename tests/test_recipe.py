"""Recipes: what llama.cpp's quantizer makes of exactly what the files say, beside what export writes."""

import ctypes
import dataclasses
import functools
import json
import os
import re
import shlex

import gguf
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
import tiny

from ramp_jax import data
from ramp_jax.allocation import Allocation
from ramp_jax.formats import get_format
from ramp_jax.halo import recipe
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.llama_quantize import captured_log
from ramp_jax.halo.recipe import COMMAND, FOLDED, IMATRIX, OUTPUT, PLAN, TYPES, read_plan, write_recipe
from ramp_jax.models import load_model, lookup, matrices, tensors
from ramp_jax.models.layout import foldable
from ramp_jax.quantization import REFERENCE, Encoder, calibrate, importance_of, make_encoder, read_imatrix, refold
from ramp_jax.quantization.importance import Origin

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KINDS = {
    "qwen3-tied": ("Q4_K", "F16"),
    "phi3": ("IQ3_S", "IQ4_XS"),
    "qwen2": ("Q4_0", "F16"),
    "gemma2": ("Q5_0", "Q8_0"),
}
"""Superblocks under a head that is the embedding; fused matrices; biases; norms around sub-blocks. The formats of each.
"""
MADE = {
    "model": "tiny",
    "budget_bytes": 123_456,
    "allocator": "policy",
    "allocator_sha256": "c" * 64,
    "fold_level": 4.5,
}
MADE |= {"overrides": ({"kind": "keep", "pattern": "output.*", "format": "Q5_0"},)}
FILE_TYPES = {option.name.removeprefix("MOSTLY_"): int(option) for option in gguf.LlamaFileType}


def overrides(path):
    """As llama-quantize parses the file: words, split at the first =, names in lower case."""
    words = path.read_text().split()
    entries = (llama_cpp.llama_model_tensor_override * (len(words) + 1))()
    for entry, word in zip(entries, words, strict=False):
        name, _, kind = word.partition("=")
        entry.pattern, entry.type = name.lower().encode(), gguf.GGMLQuantizationType[kind.upper()]
    return entries


def importance_entries(path):
    """As llama-quantize loads the file: sums over counts; what it writes into the metadata."""
    reader = gguf.GGUFReader(path)
    stored = {t.name: t.data for t in reader.tensors}
    means = {
        name.removesuffix(".in_sum2"): np.ascontiguousarray(sums / stored[name.replace("in_sum2", "counts")]).ravel()
        for name, sums in stored.items()
        if name.endswith(".in_sum2")
    }
    entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, values) in zip(entries, means.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    pairs = {
        "file": path.name.encode(),
        "dataset": reader.fields["imatrix.datasets"].contents()[0].encode()[:127],
        "entries_count": len(means),
    }
    if chunks := reader.fields["imatrix.chunk_count"].contents():
        pairs["chunks_count"] = chunks
    return entries, means, pairs


def kv_overrides(pairs):
    entries = (llama_cpp.llama_model_kv_override * (len(pairs) + 1))()
    for entry, (name, value) in zip(entries, pairs.items(), strict=False):
        entry.key = f"quantize.imatrix.{name}".encode()
        if isinstance(value, bytes):
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value
        else:
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return entries


def follow(folder):
    """Run the folder's command as the program of its name does, in the same library; returns the file's reader."""
    program, *words = shlex.split((folder / COMMAND).read_text())
    assert program == "llama-quantize"
    *options, source, output, kind = words
    options = dict(zip(options[::2], options[1::2], strict=True))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind], 2
    held = [overrides(folder / options.pop("--tensor-type-file"))]
    params.tt_overrides = held[0]
    for option, field in {
        "--token-embedding-type": "token_embedding_type",
        "--output-tensor-type": "output_tensor_type",
    }.items():
        if option in options:
            setattr(params, field, gguf.GGMLQuantizationType[options.pop(option).upper()])
    if "--imatrix" in options:
        entries, means, pairs = importance_entries(folder / options.pop("--imatrix"))
        held += [entries, means, kv_overrides(pairs)]
        params.imatrix, params.kv_overrides = entries, held[-1]
    assert options == {}
    with captured_log() as log:
        failed = llama_cpp.llama_model_quantize(
            os.fsencode(folder / source), os.fsencode(folder / output), ctypes.byref(params)
        )
    assert not failed, "".join(log)[-500:]
    assert "fallback" not in "".join(log)
    return gguf.GGUFReader(folder / output)


def drawn(model, formats, rng):
    """An allocation of some of the formats, folded as the model is."""
    formats = {tensor.name: str(rng.choice(formats)) for tensor in matrices(model.spec)}
    folding = {name: np.asarray(scales) for name, scales in model.folding.items()}
    return Allocation(model.spec, model.metadata, formats, folding, made={"encoder": "reference"})


def pairs_of(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def assert_same_files(theirs, ours):
    """Types and bytes of all tensors."""
    theirs, ours = ({t.name: t for t in reader.tensors} for reader in (theirs, ours))
    assert theirs.keys() == ours.keys()
    assert {name: t.tensor_type for name, t in theirs.items()} == {name: t.tensor_type for name, t in ours.items()}
    for name in ours:
        fmt = get_format(ours[name].tensor_type.name)
        found, expected = (np.asarray(t[name].data).view(np.uint8).reshape(-1, fmt.block_bytes) for t in (theirs, ours))
        same = (found == expected).all(axis=1)
        assert same.all(), f"{name} {fmt.name}: {(~same).sum()} of {len(same)} blocks differ"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A family's model, its statistics, and the model folded."""

    @functools.cache
    def prepare(name):
        model = load_model(str(tiny.save(tiny.family_model(name), tmp_path_factory.mktemp("kind") / name)))
        stats = calibrate(model, data.windows("builtin", model.tokenizer, context=24, count=3))
        return model, stats, scaled(model)

    return prepare


def scaled(model):
    """The model folded by any scales."""
    rng = np.random.default_rng(1)
    folding = {}
    for name, activation in foldable(model.spec).items():
        shared = np.exp(rng.normal(0, 0.5, (activation.groups, 1, activation.width)))
        by_group = np.asarray(activation.by_group(np.zeros(activation.width, np.float32)))
        folding[name] = (by_group + shared[:, :, : by_group.shape[-1]]).reshape(-1).astype(np.float32)
    return refold(model, folding)


@pytest.mark.parametrize(
    ("kind", "weighted"),
    [("qwen3-tied", False), ("qwen3-tied", True), ("phi3", False), ("qwen2", True), ("gemma2", False)],
)
def test_llama_quantize_follows_the_recipe(prepared, tmp_path, rng, kind, weighted):
    """The same types, bytes, pairs and size as our file with ggml's own rounding, folded; importance of 72 tokens, of
    which some channels are hardly seen."""
    model, stats, folded = prepared(kind)
    importance = importance_of(model.spec, stats)
    importance = {name: np.where(np.arange(len(v)) % 7, v, 0).astype(np.float32) for name, v in importance.items()}
    encoder = Encoder("reference", importance, origin=Origin(dataset="ünicode", chunks=3)) if weighted else REFERENCE
    allocation = drawn(folded, KINDS[kind], rng)
    assert allocation.folding
    plan = write_recipe(model, allocation, tmp_path / "recipe", encoder)
    assert (tmp_path / "recipe" / IMATRIX).is_file() == plan["importance"] == weighted
    theirs = follow(tmp_path / "recipe")
    export_gguf(model, allocation, tmp_path / "ours.gguf", encoder)
    ours = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert_same_files(theirs, ours)
    size = (tmp_path / "recipe" / OUTPUT).stat().st_size
    assert size == (tmp_path / "ours.gguf").stat().st_size == plan["file_bytes"] == allocation.file_bytes
    found, expected = pairs_of(theirs), pairs_of(ours)
    assert found.pop("quantize.imatrix.file", None) == (IMATRIX if weighted else None)
    for pairs in (found, expected):
        del pairs["ramp.padding"], pairs["general.file_type"]
    assert found == expected


def test_matrices_that_no_block_can_hold(odd, tmp_path):
    allocation = Allocation.uniform(scaled(odd), "Q5_0")
    write_recipe(odd, allocation, tmp_path / "recipe")
    export_gguf(odd, allocation, tmp_path / "ours.gguf")
    assert_same_files(follow(tmp_path / "recipe"), gguf.GGUFReader(tmp_path / "ours.gguf"))


@pytest.mark.parametrize("fmt", ["F16", "BF16", "F32"])
def test_recipe_without_blocks(tied, tmp_path, fmt):
    allocation = Allocation.uniform(tied, fmt)
    write_recipe(tied, allocation, tmp_path / "recipe")
    export_gguf(tied, allocation, tmp_path / "ours.gguf")
    assert_same_files(follow(tmp_path / "recipe"), gguf.GGUFReader(tmp_path / "ours.gguf"))


def test_types_that_llama_quantize_makes_by_importance_only(prepared, tmp_path):
    model = prepared("qwen3-tied")[0]
    allocation = Allocation.uniform(model, "IQ2_S")
    with pytest.raises(ValueError, match=r"llama-quantize makes blk.0.attn_q.weight IQ2_S by importance only; calibr"):
        write_recipe(model, allocation, tmp_path / "recipe")
    assert not (tmp_path / "recipe").exists()


def test_encoders_that_search_have_their_types_and_importance(untied, windows, tmp_path):
    """Compensated: the importance is that of its windows, to the last bit."""
    encoder = make_encoder("compensated", windows, dataset="builtin")
    allocation = Allocation.uniform(untied, "Q4_0")
    plan = write_recipe(untied, allocation, tmp_path / "recipe", encoder)
    assert (plan["encoder"], plan["importance"]) == ("compensated", True)
    found = read_imatrix(tmp_path / "recipe" / IMATRIX, untied.spec)
    expected = importance_of(untied.spec, calibrate(untied, windows))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, np.maximum(expected[name], values.min()), err_msg=name)
        assert (values == expected[name]).mean() > 0.9
    theirs = follow(tmp_path / "recipe")
    assert {t.name: t.tensor_type.name for t in theirs.tensors if t.name in allocation.formats} == allocation.formats
    assert pairs_of(theirs)["quantize.imatrix.chunks_count"] == 3
    assert (tmp_path / "recipe" / OUTPUT).stat().st_size == allocation.file_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_fit_one_name_each(prepared, kind):
    """Searched anywhere in a name and lower case; `output.weight` is also the end of others."""
    model, *_ = prepared(kind)
    lines = recipe.tensor_types(Allocation.uniform(model, "Q8_0")).splitlines()
    rules = [line.partition("=")[0].lower() for line in lines]
    names = [tensor.name for tensor in tensors(model.spec)]
    fits = [[name for name in names if re.search(rule, name)] for rule in rules]
    assert fits == [[tensor.name] for tensor in matrices(model.spec)]
    assert {line.partition("=")[2] for line in lines} == {"q8_0"}
    assert "attn_output" in "".join(rules)


def test_floats_that_lose_nothing(untied, tmp_path):
    """F16 where it holds the weights, BF16 where they are beyond its range, F32 where folding has scaled them."""
    low = untied.astype("float16").astype("float32")
    low = tiny.changed(low, "blk.1.ffn_down.weight", lambda w: w.astype("bfloat16").astype(jnp.float32) * 2.0**20)
    write_recipe(low, Allocation.uniform(low, "Q8_0"), tmp_path / "plain")
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "plain" / FOLDED).tensors}
    floats = {tensor.name: stored[tensor.name] for tensor in matrices(low.spec)}
    assert floats == dict.fromkeys(floats, "F16") | {"blk.1.ffn_down.weight": "BF16"}
    low = tiny.changed(low, "blk.1.ffn_down.weight", lambda w: w * 2.0**-20)
    folded = scaled(low)
    write_recipe(low, Allocation.uniform(folded, "Q8_0"), tmp_path / "folded")
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "folded" / FOLDED).tensors}
    outside = {tensor.name for tensor in matrices(low.spec) if tensor.layer is None}
    assert {name for name in floats if stored[name] == "F16"} == outside
    assert {stored[name] for name in floats if name not in outside} == {"F32"}
    found = load_model(str(tmp_path / "folded" / FOLDED))
    for tensor in tensors(low.spec):
        mine, theirs = (np.asarray(lookup(m.params, tensor)) for m in (folded, found))
        np.testing.assert_array_equal(mine, theirs, err_msg=tensor.name)


@pytest.fixture(scope="module")
def saved(untied, tmp_path_factory):
    """An allocation that was saved with all that its file says, and its recipe."""
    folder = tmp_path_factory.mktemp("saved")
    calibration = {"data": "builtin", "context": 24, "count": 3, "text": "a" * 64, "tokens": "b" * 64}
    allocation = dataclasses.replace(Allocation.uniform(untied, "Q5_0"), calibration=calibration)
    allocation.save(folder / "a.json", encoder="reference", **MADE)
    allocation = Allocation.load(folder / "a.json", untied)
    write_recipe(untied, allocation, folder / "recipe")
    return allocation, folder / "recipe"


def test_plan_says_what_it_was_made_from(saved):
    allocation, folder = saved
    plan = read_plan(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([COMMAND, FOLDED, PLAN, TYPES])
    assert plan["formats"] == allocation.formats
    assert plan["allocation"] == allocation.made["sha256"]
    assert plan["calibration"] == allocation.calibration
    expected = {**MADE, "encoder": "reference"} | {
        "file_bytes": allocation.file_bytes,
        "linear_bpw": 5.5,
        "code_bits": 5,
        "importance": False,
    }
    assert {name: plan[name] for name in expected} == expected
    assert plan["folding"]["activations"] == 0
    assert plan["command"] + "\n" == (folder / COMMAND).read_text()
    kinds = "--token-embedding-type q5_0 --output-tensor-type q5_0"
    assert plan["command"] == f"llama-quantize --tensor-type-file {TYPES} {kinds} {FOLDED} {OUTPUT} Q5_0"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            lambda plan: plan | {"formats": {"output.weight": "Q9"}},
            "formats.output.weight is 'Q9', expected one of F32",
        ),
        (lambda plan: plan | {"version": 2}, "version is 2, expected 1"),
        (lambda plan: plan | {"file_bytes": -1}, "file_bytes is -1, expected a number"),
        (lambda plan: plan | {"bits": 4}, "it has no field 'bits'"),
        (lambda plan: {k: v for k, v in plan.items() if k != "command"}, "it lacks the field 'command'"),
        (lambda plan: [plan], "expected an object"),
    ],
)
def test_plan_that_is_damaged(saved, tmp_path, change, cause):
    (tmp_path / PLAN).write_text(json.dumps(change(json.loads((saved[1] / PLAN).read_text()))))
    with pytest.raises(ValueError, match=rf"plan.json is not the plan of a recipe \(.*{cause}.*\); delete its folder"):
        read_plan(tmp_path)


def test_folder_is_whole_or_not_there(untied, saved, tmp_path, monkeypatch):
    allocation, folder = saved

    def fail(*args, **kwargs):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "tensor_types", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            write_recipe(untied, allocation, tmp_path / "new")
        assert list(tmp_path.iterdir()) == []
        patched.setattr(recipe, "encoded", fail)  # and one that is there is not written again
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        write_recipe(untied, allocation, folder)
        assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="recipe holds another recipe; delete it or choose another --recipe"):
        write_recipe(untied, Allocation.uniform(untied, "Q8_0"), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match="mine is a folder of other things; choose another --recipe"):
        write_recipe(untied, allocation, tmp_path / "mine")
    for path in (tmp_path / "mine" / "letter.txt", tmp_path / "nowhere" / "recipe"):
        with pytest.raises(OSError, match="cannot make"):
            write_recipe(untied, allocation, path)


def test_export_writes_parts_and_a_recipe(call, fails, untied, untied_directory, tmp_path):
    """In one command; neither is overwritten unasked, and a recipe that is there already serves again."""
    allocation = Allocation.uniform(untied, "Q8_0")
    allocation.save(tmp_path / "a.json", encoder="reference", budget_bytes=allocation.file_bytes)
    arguments = [f"--model={untied_directory}", f"--allocation={tmp_path / 'a.json'}", "--shard_size=50kB"]
    arguments += [f"--output={tmp_path / 'o.gguf'}", f"--recipe={tmp_path / 'recipe'}"]
    code, printed, errors = call("export_gguf", *arguments)
    assert code == 0, errors
    parts = sorted(tmp_path.glob("o-*.gguf"))
    sizes = [part.stat().st_size for part in parts]
    assert len(parts) > 2
    assert max(sizes) <= 50_000
    assert f"{sum(sizes):,} bytes: {parts[0]} and {len(parts) - 1} more" in printed
    assert f"{sum(sizes) - allocation.file_bytes:,} bytes beyond the budget are headers of the parts" in printed
    found = {t.name: t.data.tobytes() for part in parts for t in gguf.GGUFReader(part).tensors}
    assert found == {t.name: t.data.tobytes() for t in follow(tmp_path / "recipe").tensors}
    assert f"{parts[0].name} exists; choose another name or pass --overwrite" in fails("export_gguf", *arguments)
    more = ["--overwrite", "--verify_windows=1", "--guard=off", f"--json={tmp_path / 'check.json'}"]
    code, printed, errors = call("export_gguf", *arguments, *more)
    assert code == 0, errors
    assert json.loads((tmp_path / "check.json").read_text())["file_bytes"] == sum(sizes)
    assert f"llama-cli -m {parts[0]}" in printed
    for more, sentence in {
        "--guard=replace": "--guard=replace puts one file in the place of one; leave it out with --shard_size",
        "--shard_size=many": "must be a size, as in 2GB",
        f"--recipe={tmp_path}": "is a folder of other things; choose another --recipe",
        "--shard_size=1kB": "choose a larger --shard_size",
    }.items():
        assert sentence in fails("export_gguf", *arguments, "--overwrite", more, "--verify_windows=1")
