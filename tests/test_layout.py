"""The layout: names and what belongs together by hand, runs of blocks, scans over them, and trees with other values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ramp_jax.models import Tensor, allocatable, lookup, tensors
from ramp_jax.models.attention import Attention
from ramp_jax.models.layout import (
    Activation,
    Block,
    Run,
    Weight,
    by_run,
    foldable,
    nest,
    of_block,
    replace_in_block,
    replaced,
    runs,
    scan_blocks,
    stack,
)
from ramp_jax.models.mlp import GatedMlp
from ramp_jax.models.rope import Rope

OF_A_BLOCK = """
    attn_norm    gain   64     -         -
    attn_q       matrix 64x64  attn_in   attn_out
    attn_k       matrix 32x64  attn_in   attn_out
    attn_v       matrix 32x64  attn_in   attn_out
    attn_output  matrix 64x64  attn_mid  attn_out
    ffn_norm     gain   64     -         -
    ffn_gate     matrix 96x64  ffn_in    ffn_out
    ffn_up       matrix 96x64  ffn_in    ffn_out
    ffn_down     matrix 64x96  ffn_mid   ffn_out
"""


def blocks(kinds):
    """Blocks of one small MLP, equal where their letters are."""
    return tuple(Block((GatedMlp(8, 16 + ord(kind), 1e-6),)) for kind in kinds)


def test_tensors_of_a_llama_by_hand(untied):
    rows = [line.split() for line in OF_A_BLOCK.strip().splitlines()]
    listed = tensors(untied.spec)
    assert [t.name for t in listed] == [
        "token_embd.weight",
        *(f"blk.{layer}.{row[0]}.weight" for layer in range(3) for row in rows),
        "output_norm.weight",
        "output.weight",
    ]
    for layer in range(3):
        members = [t for t in listed if t.layer == layer]
        for tensor, (module, kind, shape, reads, written) in zip(members, rows, strict=True):
            assert tensor.path == ("blk", layer, module, "weight")
            assert tensor.weight.kind == kind
            assert "x".join(map(str, tensor.shape)) == shape
            assert tensor.size == np.prod(tensor.shape)
            assert tensor.allocatable == (kind == "matrix")
            assert tensor.reads == (None if reads == "-" else f"blk.{layer}.{reads}")
            if kind == "matrix":
                assert tensor.written == f"blk.{layer}.{written}"


def test_tensors_outside_the_blocks(untied, tied):
    embedding, *_, norm, head = tensors(untied.spec)
    assert (embedding.path, embedding.reads, embedding.written) == (("token_embd", "weight"), "token", None)
    assert (norm.path, norm.reads, norm.allocatable) == (("output_norm", "weight"), None, False)
    assert (head.path, head.reads, head.shape) == (("output", "weight"), "head_in", (320, 64))
    assert tensors(tied.spec)[0].reads == "head_in"
    assert [t.name for t in tensors(tied.spec)] == [t.name for t in tensors(untied.spec)][:-1]
    assert allocatable(tied.spec) == tuple(t for t in tensors(tied.spec) if len(t.shape) == 2)


def test_what_writes_to_the_stream_and_what_turns(untied):
    members = [t.weight for t in tensors(untied.spec) if t.layer == 2]
    assert [w.name for w in members if w.writes] == ["attn_output.weight", "ffn_down.weight"]
    assert {w.name: w.rope_heads for w in members if w.rope_heads} == {"attn_q.weight": 4, "attn_k.weight": 2}
    places = [w.place for w in members if w.kind == "matrix"]
    np.testing.assert_allclose(places, np.arange(7) / 7)


def test_activations_and_their_makers(untied):
    block = untied.spec.blocks[0]
    assert {a.name: a.maker for a in block.activations} == {tap: maker for tap, (maker, _) in tiny.GROUPS.items()}
    for tap, (_, readers) in tiny.GROUPS.items():
        assert [weight.name for weight in block.readers(tap)] == [f"{name}.weight" for name in readers]
    assert block.taps == ("residual", "attn_in", "attn_mid", "attn_out", "ffn_in", "ffn_mid", "ffn_out")
    assert list(foldable(untied.spec)) == [f"blk.{layer}.{tap}" for layer in range(3) for tap in tiny.GROUPS]


def test_channels_that_share_a_row_by_hand():
    """Two groups, each read by two heads of two channels: heads 0 and 1 share rows 0 and 1 of the maker."""
    activation = Activation("x", 8, "v", groups=2, repeats=2)
    share = activation.share(jnp.asarray([3.0, 1, 4, 1, 0, 2, 0, 2]))
    np.testing.assert_allclose(share, [12.5**0.5, 1] * 2 + [0, 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(activation.maker_rows(share), [12.5**0.5, 1, 0, 2], rtol=1e-6)
    np.testing.assert_array_equal(Activation("y", 3, "up").maker_rows(jnp.arange(3)), [0, 1, 2])


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("aaaa", [(0, 1, 4)]),
        ("abababab", [(0, 2, 4)]),
        ("lllllg" * 4 + "ll", [(0, 6, 4), (24, 1, 2)]),
        ("abcd", [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1)]),
        ("aab", [(0, 1, 2), (2, 1, 1)]),
        ("abbbb", [(0, 1, 1), (1, 1, 4)]),
        ("aabaab", [(0, 3, 2)]),
    ],
    ids=["none", "one", "equal", "in turn", "gemma 3", "different", "first equal", "last equal", "twice"],
)
def test_runs_by_hand(kinds, expected):
    assert list(runs(blocks(kinds))) == [Run(*run) for run in expected]


@pytest.mark.parametrize("seed", range(30))
def test_runs_cover_every_block_with_its_kind(seed):
    rng = np.random.default_rng(seed)
    made = blocks(rng.choice(list("abc"), rng.integers(1, 14)))
    covered = [made[first] for run in runs(made) for _ in range(run.count) for first in run.firsts]
    assert tuple(covered) == made
    indices = [
        range(first, run.first + run.period * run.count, run.period) for run in runs(made) for first in run.firsts
    ]
    assert sorted(index for part in indices for index in part) == list(range(len(made)))
    entries = by_run(made, list)
    assert [list(part) for run in entries for part in run] == [list(part) for part in indices]


def drawn(rng, block):
    """Random weights of a block, as its part of the tree."""
    return replace_in_block(
        {}, {w.name: jnp.asarray(rng.normal(0.5, 0.3, w.shape), jnp.float32) for w in block.weights}
    )


@pytest.mark.parametrize("kinds", ["lg" * 3, "llg" * 2 + "l", "lllg", "glll"])
def test_scan_equals_the_loop_for_kinds_in_turn(rng, kinds):
    """Attention that turns before a wide MLP, and attention without positions behind an MLP with another activation."""
    sizes = (32, 4, 2, 8, 1e-5)
    local = Block((Attention(*sizes, Rope(1e4, 8), qk_norm="heads"), GatedMlp(32, 48, 1e-5)))
    still = Attention(*sizes, None, norm=None, post_norm="post_attention_norm")
    other = Block((GatedMlp(32, 24, 1e-5, "gelu_tanh"), still))
    made = tuple({"l": local, "g": other}[kind] for kind in kinds)
    trees = [drawn(rng, block) for block in made]
    x = jnp.asarray(rng.normal(size=(2, 9, 32)), jnp.float32)
    expected = x
    for block, w in zip(made, trees, strict=True):
        expected = block(w, expected)
    entries = by_run(made, lambda indices: stack([trees[index] for index in indices]))
    found = jax.jit(lambda entries, x: scan_blocks(made, entries, x))(entries, x)
    assert float(jnp.abs(expected - x).max()) > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_scan_makes_weights_of_entries(rng):
    made = blocks("aaa")
    trees = [drawn(rng, block) for block in made]
    x = jnp.asarray(rng.normal(size=(1, 3, 8)), jnp.float32)
    halves = by_run(made, lambda indices: jax.tree.map(lambda a: a / 2, stack([trees[i] for i in indices])))
    plain = scan_blocks(made, by_run(made, lambda indices: stack([trees[i] for i in indices])), x)
    doubled = scan_blocks(made, halves, x, lambda entry: jax.tree.map(lambda a: 2 * a, entry))
    np.testing.assert_allclose(doubled, plain, rtol=1e-6)


def test_tree_of_all_tensors_is_the_parameter_tree(model):
    again = nest((tensor, lookup(model.params, tensor)) for tensor in tensors(model.spec))
    assert jax.tree.structure(again) == jax.tree.structure(model.params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model.params), strict=True))


def test_replaced_values_are_there_and_all_others_shared(untied):
    members = {t.name: t for t in tensors(untied.spec)}
    chosen = [members[name] for name in ("blk.1.ffn_up.weight", "output_norm.weight", "blk.2.attn_norm.weight")]
    before = dict(untied.params["blk"][1])
    params = replaced(untied.params, [(t, t.name) for t in chosen])
    for tensor in members.values():
        value = lookup(params, tensor)
        assert value == tensor.name if tensor in chosen else value is lookup(untied.params, tensor)
    assert untied.params["blk"][1] == before
    back = replaced(params, [(t, lookup(untied.params, t)) for t in chosen])
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(untied.params), strict=True))
    assert replaced(untied.params, []).keys() == untied.params.keys()


def test_weights_of_a_block_by_name(untied):
    w = untied.params["blk"][0]
    bias, gate = object(), object()
    changed = replace_in_block(w, {"attn_q.bias": bias, "ffn_gate.weight": gate})
    assert of_block(changed, "attn_q.bias") is bias
    assert of_block(changed, "ffn_gate.weight") is gate
    assert of_block(changed, "attn_q.weight") is of_block(w, "attn_q.weight")
    assert "bias" not in w["attn_q"]
    assert changed["ffn_down"] is w["ffn_down"]


def test_biases_belong_to_the_linears_that_are_named():
    """In the order of their matrices, outside of what is allocated; those of q and k turn with their rows."""
    attention = Attention(16, 2, 1, 8, 1e-6, Rope(1e4, 8), biased=("attn_q", "attn_v"))
    mlp = GatedMlp(16, 32, 1e-6, biased=("ffn_down",))
    names = [weight.name for weight in Block((attention, mlp)).weights]
    assert names[1:5] == ["attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_v.weight"]
    assert [name for name in names if name.endswith("bias")] == ["attn_q.bias", "attn_v.bias", "ffn_down.bias"]
    found = {weight.name: weight for weight in attention.weights}
    assert found["attn_q.bias"] == Weight("attn_q.bias", (16,), "bias", rope_heads=2)
    assert not Tensor(found["attn_q.bias"], 0).allocatable


def test_equal_blocks_are_one_kind(untied, tied):
    assert len({*untied.spec.blocks, *tied.spec.blocks}) == 1
    wider = dataclasses.replace(untied.spec, d_ff=128)
    assert wider.blocks[0] != untied.spec.blocks[0]
