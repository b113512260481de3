"""Saved policies, and allocations that always fit."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from ramp_jax import data
from ramp_jax.allocation import ALIGNMENT, Allocation, costs, from_levels
from ramp_jax.allocators.allocator import Problem, estimated_optimum, expected_loss
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.allocators.tables import total
from ramp_jax.formats import LEVELS as FORMAT_LEVELS
from ramp_jax.formats import format_for
from ramp_jax.models import allocatable
from ramp_jax.models.layout import foldable
from ramp_jax.policy import embedding, inference, networks, train
from ramp_jax.policy.env import ACTION, CONTEXT, Observation
from ramp_jax.policy.inference import POLICY_FILE, Policy, allocate, find_allocator, load_policy
from ramp_jax.policy.refinement import refine
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import Task, TrainConfig
from ramp_jax.quantization import calibrate, fake_quantize, fold
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.sensitivity.exact import exact_sensitivity
from ramp_jax.sensitivity.table import Sensitivity

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LEVELS, HIDDEN = (4, 5, 8), (16,)


def policy_of(seed):
    """An actor that nobody trained, with opinions strong enough to use every level, whatever the estimate says."""
    actor = networks.actor(HIDDEN).init(jax.random.key(seed), 11 + CONTEXT)
    actor = jax.tree.map(lambda leaf: leaf * 50, actor)
    actor["trust"] = jnp.float32(0.0)
    return Policy(actor, HIDDEN, LEVELS, 4, ("tiny",))


@pytest.fixture(scope="module")
def prepared(untied, windows):
    stats = calibrate(untied, windows)
    return fold(untied, stats, 4), stats


def test_policy_comes_back(tmp_path):
    policy = policy_of(0)
    policy.save(tmp_path)
    loaded = load_policy(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.actor, policy.actor)
    same = {name: value for name, value in vars(policy).items() if name != "actor"}
    assert same == {name: value for name, value in vars(loaded).items() if name != "actor"}
    assert [path.name for path in tmp_path.iterdir()] == [POLICY_FILE]


def test_shipped_policy_says_what_it_was_trained_to():
    """Logits of one observation, as they were when it was trained."""
    policy = load_policy("pretrained")
    network = networks.actor(policy.hidden)
    seen = Observation(jnp.linspace(-1, 1, 17), jnp.linspace(-1, 1, 7 * ACTION).reshape(7, ACTION))
    expected = [8.401716, 7.318734, 5.768444, 0.848543, -7.506628, -9.278560, -10.199864]
    np.testing.assert_allclose(network.apply(policy.actor, seen), expected, rtol=1e-4)


def test_policy_of_another_embedding_is_refused(tmp_path):
    dataclasses.replace(policy_of(0), embedding_version=embedding.VERSION + 1).save(tmp_path)
    sentence = rf"version {embedding.VERSION + 1} of the embedding, .*\); delete it and train it again\.$"
    with pytest.raises(ValueError, match=sentence):
        load_policy(tmp_path)


def with_leaf(actor, path, change):
    """The tree with `change(leaf)` in place of one leaf."""
    first, *rest = path
    return {**actor, first: with_leaf(actor[first], rest, change) if rest else change(actor[first])}


NO_NETWORK = "it is no network of the 17 numbers that this program shows it"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda known: {"a": 1}, "it has no field 'a'"),
        (lambda known: [known], "expected an object"),
        (lambda known: {k: v for k, v in known.items() if k != "fold_level"}, "it lacks the field 'fold_level'"),
        (lambda known: known | {"levels": [4, 8, 5]}, r"levels is \[4, 8, 5\], expected levels by increasing size"),
        (lambda known: known | {"levels": [4, "IQ3_S"]}, r"levels is \[4, 'IQ3_S'\], expected levels by increasing"),
        (lambda known: known | {"levels": [4, 5, "8"]}, r"levels is \[4, 5, '8'\], expected levels by increasing size"),
        (lambda known: known | {"levels": [4, 5, float("nan")]}, r"levels\[2\] is nan, expected a finite number or"),
        (lambda known: known | {"levels": [4, [5]]}, r"levels\[1\] is \[5\], expected a finite number or a text"),
        (lambda known: known | {"levels": 4}, "levels is 4, expected a list"),
        (lambda known: known | {"fold_level": float("inf")}, "fold_level is inf, expected a finite number"),
        (lambda known: known | {"fold_level": "4"}, "fold_level is '4', expected a finite number"),
        (lambda known: known | {"hidden": [0]}, r"hidden\[0\] is 0, expected a number from 1 to 65,536"),
        (lambda known: known | {"hidden": [1] * 10**5}, "1 to 16 widths of layers"),
        (lambda known: known | {"hidden": [65536] * 16}, NO_NETWORK),
        (lambda known: known | {"hidden": []}, "1 to 16 widths of layers"),
        (lambda known: known | {"trained_on": "tiny"}, "trained_on is 'tiny', expected a list"),
        (lambda known: known | {"embedding_version": None}, "embedding_version is None, expected a whole number"),
        (lambda known: known | {"actor": {}}, NO_NETWORK),
        (lambda known: known | {"actor": known["actor"] | {"more": None}}, "it has empty parts"),
        (lambda known: known | {"actor": known["actor"] | {"more": {}}}, "it has empty parts"),
        (lambda known: known | {"actor": with_leaf(known["actor"], ["trust"], lambda _: 1.0)}, f"trust {NO_NETWORK}"),
        (lambda known: known | {"actor": with_leaf(known["actor"], ["trust"], lambda w: w[None])}, NO_NETWORK),
        (
            lambda known: known | {"actor": known["actor"] | {"more": np.ones(1, np.float32)}},
            f"by its more {NO_NETWORK}",
        ),
        (
            lambda known: (
                known | {"actor": with_leaf(known["actor"], ["head", "kernel"], lambda w: w.astype(np.float16))}
            ),
            f"by its head.kernel {NO_NETWORK}",
        ),
        (
            lambda known: known | {"actor": with_leaf(known["actor"], ["head", "kernel"], lambda w: w * np.nan)},
            "its head.kernel is not finite",
        ),
    ],
)
def test_policy_that_does_not_serve_is_refused(tmp_path, change, cause):
    """When it is loaded, not when it is applied; also where the file's own digest was left out."""
    policy_of(0).save(tmp_path)
    path = tmp_path / POLICY_FILE
    known = serialization.msgpack_restore(path.read_bytes())
    del known["sha256"]
    path.write_bytes(serialization.msgpack_serialize(change(known)))
    sentence = rf"policy\.msgpack is not a policy of this program \(.*{cause}.*\); delete it and train it again"
    with pytest.raises(ValueError, match=sentence):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda content: b"", "Unpack failed: incomplete input"),
        (lambda content: content[: len(content) // 2], "incomplete"),
        (lambda content: b"policy", "unpack"),
        (lambda content: content[:400] + bytes([content[400] ^ 1]) + content[401:], "its sha256 is another"),
        (lambda content: b"\x91" * 10**5, ""),
    ],
)
def test_damaged_policy_is_refused(tmp_path, damage, cause):
    policy_of(0).save(tmp_path)
    path = tmp_path / POLICY_FILE
    path.write_bytes(damage(path.read_bytes()))
    sentence = rf"policy\.msgpack is not a policy of this program \(.*{cause}.*\); delete it and train it again"
    with pytest.raises(ValueError, match=sentence):
        load_policy(tmp_path)


def test_folder_without_a_policy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no policy.msgpack; train one with launch/train.py"):
        load_policy(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no policy.msgpack"):
        load_policy(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def known(prepared):
    return inference.problem(*prepared, LEVELS)


def test_policies_choose_among_levels_that_they_never_saw(prepared):
    """More, others, and formats by name; the size of a file is that of the budget all the same."""
    folded, stats = prepared
    assert policy_of(0).allocator().levels == LEVELS
    for levels in [(4, 5), (4, 5, 6, 8), ("Q4_1",), (4, "Q4_1", 6)]:
        table = costs(folded, levels)
        budget = (table.smallest + table.largest) // 2
        found = allocate(policy_of(1).allocator(levels), folded, stats, budget_bytes=budget)
        assert table.smallest <= found.file_bytes <= budget
        assert set(found.formats.values()) <= {format_for(level, 64).name for level in levels}


def test_units_of_the_environment_are_the_file_s():
    assert ALIGNMENT == ALIGNMENT


def test_problem_holds_sizes_and_weights(prepared):
    folded, stats = prepared
    problem = inference.problem(folded, stats, LEVELS)
    members = allocatable(folded.spec)
    np.testing.assert_array_equal(problem.weights, [t.size for t in members])
    np.testing.assert_array_equal(problem.cost * ALIGNMENT, [[t.size // 32 * b for b in (18, 22, 34)] for t in members])
    np.testing.assert_allclose(problem.embedding, embedding.embed(folded, stats), atol=1e-5)
    np.testing.assert_allclose(problem.expected, embedding.estimated(folded, stats, LEVELS).loss, rtol=1e-5)


def test_masked_levels_cost_nothing_in_the_problem(prepared):
    np.testing.assert_array_equal(inference.problem(*prepared, (7, 8)).cost[:, 0], 0)


@settings(max_examples=20)
@given(st.integers(0, 3), st.floats(0, 1))
def test_allocations_fit_and_use_the_policy_s_levels(prepared, known, seed, share):
    folded, stats = prepared
    table = costs(folded, LEVELS)
    budget = table.smallest + int(share * (table.largest - table.smallest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "problem", lambda *_, **__: known)  # the same at every budget
        allocation = allocate(policy_of(seed), folded, stats, budget_bytes=budget)
    assert table.smallest <= allocation.file_bytes <= budget
    assert set(allocation.formats.values()) <= {"IQ4_NL", "Q5_0", "Q8_0"}
    assert set(allocation.folding) == set(foldable(folded.spec))


def test_allocation_is_deterministic_and_policies_differ(prepared):
    folded, stats = prepared
    table = costs(folded, LEVELS)
    budget = (table.smallest + table.largest) // 2
    first, again = (allocate(policy_of(0), folded, stats, budget_bytes=budget).formats for _ in range(2))
    assert first == again
    known, units = inference.problem(folded, stats, LEVELS, table), table.units(budget)
    played = [inference.choose(policy_of(seed), known, units, repair=False).tolist() for seed in range(4)]
    assert any(played[0] != other for other in played[1:])


def test_no_choice_is_expected_to_lose_far_more_than_the_optimum(prepared):
    """Policies that nobody trained: played as they are they lose more than twice what repaired ones may at most."""
    folded, stats = prepared
    table = costs(folded, LEVELS)
    known, units = inference.problem(folded, stats, LEVELS, table), table.units((table.smallest + table.largest) // 2)
    least = expected_loss(known, estimated_optimum(known, units))
    losses = [
        [expected_loss(known, inference.choose(policy_of(seed), known, units, repair=repair)) for seed in range(4)]
        for repair in (False, True)
    ]
    assert max(losses[0]) > 2.3 * least
    assert max(losses[1]) <= 1.15 * least


def test_ends_of_the_range_are_the_uniform_files(prepared):
    folded, stats = prepared
    table = costs(folded, LEVELS)
    for seed in (0, 1):
        small = allocate(policy_of(seed), folded, stats, budget_bytes=table.smallest)
        assert set(small.formats.values()) == {"IQ4_NL"}
        assert small.file_bytes == table.smallest


def test_budget_out_of_range_prints_the_range(prepared):
    folded, stats = prepared
    table = costs(folded, LEVELS)
    wanted = re.escape(f"choose between {table.smallest:,} and {table.largest:,} bytes")
    for budget in (1, table.smallest - 1, table.largest + 1):
        with pytest.raises(ValueError, match=wanted):
            allocate(policy_of(0), folded, stats, budget_bytes=budget)


def test_what_is_left_is_spent_where_it_saves_most():
    """An actor that takes the smallest level; two units are left, and the second tensor loses more per unit."""
    known = Problem(
        jnp.zeros((2, 11)),
        jnp.array([256.0, 256.0]),
        jnp.array([[4, 6, 8], [4, 6, 8]], jnp.int32),
        jnp.array([[1.0, 0.25, 0.004], [10.0, 2.5, 0.04]]),
    )
    actor = jax.tree.map(jnp.zeros_like, policy_of(0).actor)  # all levels alike: the first is taken
    policy = dataclasses.replace(policy_of(0), actor=actor)
    assert inference.choose(policy, known, 9).tolist() == [0, 0]
    assert inference.choose(policy, known, 10).tolist() == [0, 1]
    assert inference.choose(policy, known, 12).tolist() == [0, 2]
    assert inference.choose(policy, known, 14).tolist() == [1, 2]
    assert inference.choose(policy, known, 16).tolist() == [2, 2]


def test_policy_of_another_observation_is_refused(tmp_path):
    actor = networks.actor(HIDDEN).init(jax.random.key(0), 15)
    dataclasses.replace(policy_of(0), actor=actor).save(tmp_path)
    with pytest.raises(
        ValueError, match=rf"by its hidden.0.linear.kernel {NO_NETWORK}\); delete it and train it again"
    ):
        load_policy(tmp_path)


def three_tensors():
    """Three tensors of one size at three levels; what each loses is estimated wrongly for the first."""
    bits = np.array([4.0, 5.0, 8.0])
    estimate = np.array([1.0, 4.0, 16.0])[:, None] * 4.0 ** -bits[None, :]
    true = np.array([64.0, 4.0, 16.0])[:, None] * 4.0 ** -bits[None, :]
    cost = jnp.asarray(np.tile(10 * bits, (3, 1)), jnp.int32)
    single = [jnp.asarray(values, jnp.float32) for values in (np.zeros((3, 11)), np.full(3, 2560.0), estimate)]
    return Problem(single[0], single[1], cost, single[2]), true


@pytest.mark.parametrize("evaluations", [1, 4, 40])
def test_refinement_keeps_to_its_evaluations_and_never_loses(evaluations):
    known, true = three_tensors()
    calls = []

    def evaluate(action):
        calls.append(true[np.arange(3), action].sum())
        return calls[-1]

    policy = policy_of(0)
    first = inference.choose(policy, known, 170)
    refined = refine(policy.allocator(), evaluations)
    found = refined.choose(known._replace(evaluate=evaluate), 170)
    assert refined.evaluations == evaluations
    assert len(calls) <= evaluations
    assert np.asarray(known.cost)[np.arange(3), found].sum() <= 170
    assert true[np.arange(3), found].sum() == min(calls) <= calls[0] == true[np.arange(3), first].sum()
    if evaluations == 40:
        best = knapsack(np.asarray(known.cost), true, 170)
        assert min(calls) == pytest.approx(true[np.arange(3), best].sum())


def test_draws_fit_and_differ():
    known, _ = three_tensors()
    policy = dataclasses.replace(policy_of(0), actor=jax.tree.map(jnp.zeros_like, policy_of(0).actor))
    drawn = inference.draw(policy, known, 170, 20)
    assert all(np.asarray(known.cost)[np.arange(3), action].sum() <= 170 for action in drawn)
    assert len({tuple(action) for action in drawn}) > 1
    np.testing.assert_array_equal(drawn, inference.draw(policy, known, 170, 20))


def test_pairs_decide_where_they_are_known():
    """That errors of the first two tensors at their middle level cancel is no part of single losses; the optimum takes
    it, and repair."""
    known, _ = three_tensors()
    known = known._replace(expected=jnp.asarray([[3.0, 2.9, 0.5]] * 3, jnp.float32))
    pairs = np.zeros((3, 3, 3, 3), np.float32)
    pairs[0, 1, 1, 1] = pairs[1, 1, 0, 1] = -4.0
    policy = policy_of(0)
    for choose in (estimated_optimum, lambda known, units: inference.choose(policy, known, units)):
        plain, aware = choose(known, 170), choose(known._replace(pairs=jnp.asarray(pairs)), 170)
        assert tuple(plain[:2]) != (1, 1)
        assert tuple(aware[:2]) == (1, 1)
        assert np.asarray(known.cost)[np.arange(3), aware].sum() <= 170


def test_an_allocation_says_what_there_was_to_choose_among(prepared, known, tmp_path):
    """Bytes and predicted loss of every format of a tensor, and what it alone would change: pairs included."""
    folded, stats = prepared
    table = costs(folded, LEVELS)
    budget = (table.smallest + table.largest) // 2
    found = allocate(find_allocator("fisher", levels=LEVELS), folded, stats, budget_bytes=budget)
    actions = estimated_optimum(known, table.units(budget))
    assert found.made["predicted_kld"] == pytest.approx(expected_loss(known, actions), rel=1e-6)
    for t, tensor in enumerate(allocatable(folded.spec)):
        choices = found.made["choices"][tensor.name]
        assert [fmt for fmt in choices if choices[fmt]["change"] == 0] == [found.formats[tensor.name]]
        for a in np.flatnonzero(table.per_level[t]):
            other = actions.copy()
            other[t] = a
            choice = choices[format_for(LEVELS[a], tensor.shape[-1]).name]
            changed = expected_loss(known, other) - expected_loss(known, actions)
            assert choice["change"] == pytest.approx(changed, rel=1e-3, abs=1e-6)
            assert choice["loss"] == pytest.approx(float(known.expected[t, a]), rel=1e-4)
            size = from_levels(folded, [LEVELS[level] for level in other]).file_bytes
            assert choice["bytes"] - choices[found.formats[tensor.name]]["bytes"] == size - found.file_bytes
    found.save(tmp_path / "alloc.json")
    loaded = Allocation.load(tmp_path / "alloc.json", folded)
    assert {name: loaded.made[name] for name in found.made} == found.made
    blind = allocate(find_allocator("uniform"), folded, stats, budget_bytes=budget)
    assert blind.made.keys() == {"choices"}
    assert all(choice.keys() == {"bytes"} for offered in blind.made["choices"].values() for choice in offered.values())


def test_fisher_is_the_estimate_s_optimum_over_all_levels(prepared):
    folded, stats = prepared
    table = costs(folded, FORMAT_LEVELS)
    budget = (table.smallest + table.largest) // 2
    found = allocate(find_allocator("fisher"), folded, stats, budget_bytes=budget)
    known = inference.problem(folded, stats, FORMAT_LEVELS)
    best = estimated_optimum(known, table.units(budget))
    assert found.formats == from_levels(folded, [FORMAT_LEVELS[a] for a in best]).formats
    assert found.file_bytes <= budget


@pytest.mark.parametrize("name", ["fisher", "greedy", "uniform", "random", "evolution", "pretrained", "tiny.npz"])
@pytest.mark.parametrize("evaluations", [0, 20])
def test_every_name_is_an_allocator(tmp_path, name, evaluations):
    """Three tensors at a policy's levels: choices fit, ask as often as they may, and those that ask lose least."""
    known, true = three_tensors()
    levels = LEVELS
    if name == "pretrained":
        name, levels = tmp_path, None
        policy_of(0).save(tmp_path)
    if name == "tiny.npz":
        name = tmp_path / name
        Sensitivity(("a", "b", "c"), LEVELS, true, np.zeros(3), 5.0).save(name)
    if name == "evolution" and not evaluations:
        with pytest.raises(ValueError, match=r"say how many with --refine_evals=N\.$"):
            find_allocator(name, levels=levels)
        return
    asked = []

    def evaluate(actions):
        asked.append(total(true, actions))
        return asked[-1]

    found = find_allocator(name, levels=levels, evaluations=evaluations)
    assert found.levels == LEVELS
    assert found.evaluations == evaluations
    if evaluations:
        with pytest.raises(ValueError, match="needs true evaluations of the model"):
            found.choose(known, 170)
    actions = found.choose(known._replace(evaluate=evaluate), 170)
    assert total(np.asarray(known.cost), actions) <= 170
    assert len(asked) <= evaluations
    optimum = total(true, knapsack(np.asarray(known.cost), true, 170))
    assert total(true, actions) == pytest.approx(min(asked) if evaluations else total(true, actions))
    if evaluations or Path(name).suffix:
        assert total(true, actions) < 1.3 * optimum
    assert found.seconds == (5.0 if Path(name).suffix else 0.0)


def test_allocators_without_a_policy_choose_their_levels():
    assert find_allocator("greedy", levels=(8, 4, 5, 4)).levels == (4, 5, 8)
    assert find_allocator("uniform").levels == FORMAT_LEVELS


def test_levels_of_a_table_are_its_own_and_a_policy_takes_any(tmp_path):
    policy_of(0).save(tmp_path)
    Sensitivity(("a",), LEVELS, np.ones((1, 3)), np.zeros(1)).save(tmp_path / "table.npz")
    for source in (tmp_path, tmp_path / "table.npz"):
        assert find_allocator(source).levels == find_allocator(source, levels=LEVELS).levels == LEVELS
    assert find_allocator(tmp_path, levels=("IQ3_S", 4)).levels == ("IQ3_S", 4)
    assert find_allocator("pretrained").levels == FORMAT_LEVELS
    assert "IQ3_S" in load_policy("pretrained").levels
    with pytest.raises(ValueError, match="was measured for levels 4,5,8, not 4,6; ask for its levels"):
        find_allocator(tmp_path / "table.npz", levels=(4, 6))


def test_tables_know_formats_by_name(tmp_path):
    """And numbers as they were stored before formats had names."""
    levels = (2, "IQ3_S", 4.5)
    found = Sensitivity(("a",), levels, np.ones((1, 3)), np.zeros(1))
    found.save(tmp_path / "table.npz")
    assert Sensitivity.load(tmp_path / "table.npz").levels == levels
    np.savez(
        tmp_path / "old.npz", tensors=["a"], levels=LEVELS, kld=found.kld, floor=found.floor, seconds=1.0, inputs="{}"
    )
    assert Sensitivity.load(tmp_path / "old.npz").levels == LEVELS


@pytest.mark.parametrize(
    ("levels", "cause"),
    [
        (np.asarray("45"), "levels is '45', expected a list"),
        (np.asarray(4.0), "levels is 4.0, expected a list"),
        (["4", "bogus", "8"], "'bogus' is no level; choose among 2, 3"),
        (["4", "8", "5"], "expected levels by increasing size"),
        (None, "it lacks the field 'levels'"),
    ],
)
def test_tables_whose_levels_are_none_are_refused(tmp_path, levels, cause):
    parts = {"tensors": ["a"], "levels": levels, "kld": np.ones((1, 3)), "floor": np.zeros(1)}
    np.savez(tmp_path / "t.npz", **{k: v for k, v in parts.items() if v is not None}, seconds=1.0, inputs="{}")
    with pytest.raises(ValueError, match=rf"is not a sensitivity table of version 2 \(.*{cause}.*\); delete what"):
        Sensitivity.load(tmp_path / "t.npz")


def test_table_of_another_model_is_refused(tmp_path):
    Sensitivity(("a",), LEVELS, np.ones((1, 3)), np.zeros(1)).save(tmp_path / "table.npz")
    sentence = "the table was measured on another model, with 1 tensors where this one has 3"
    with pytest.raises(ValueError, match=sentence):
        find_allocator(tmp_path / "table.npz").choose(three_tensors()[0], 170)


def test_table_with_other_names_is_refused(prepared, tmp_path):
    folded, stats = prepared
    names = [tensor.name for tensor in allocatable(folded.spec)]
    for wrong in (names, [*names[1:], names[0]]):
        table = np.tile([3.0, 2.0, 1.0], (len(names), 1))
        Sensitivity(tuple(wrong), LEVELS, table, np.zeros(len(names))).save(tmp_path / "table.npz")
        budget = Allocation.uniform(folded, "Q8_0").file_bytes
        if wrong == names:
            found = allocate(find_allocator(tmp_path / "table.npz"), folded, stats, budget_bytes=budget)
            assert found.formats == Allocation.uniform(folded, "Q8_0").formats
        else:
            with pytest.raises(ValueError, match="the table was measured on another model"):
                allocate(find_allocator(tmp_path / "table.npz"), folded, stats, budget_bytes=budget)


def test_a_policy_trained_on_one_model_beats_uniform_on_another(prepared, untied, tied, windows):
    """Trained on the exact table of one tiny model; on the other, at the bytes of uniform Q5_0, it loses less on text
    that neither saw, without an evaluation of it."""
    levels = (4, 5, 6, 8)
    folded, stats = prepared
    loss = exact_sensitivity(folded, windows, levels, "sliding").kld
    task = Task(inference.problem(folded, stats, levels), jnp.asarray(loss, jnp.float32))
    short = TrainConfig(iterations=20, episodes=8, updates=8, seeds=1, sac=SacConfig(hidden=(32,), batch_size=64))
    with jax.numpy_dtype_promotion("standard"):
        actor = train.run(jax.random.key(0), (task,), short).actor
    policy = Policy(actor, short.sac.hidden, levels, 4, ("untied",))

    other_stats = calibrate(tied, windows)
    other = fold(tied, other_stats, 4)
    uniform = from_levels(other, [5] * len(allocatable(other.spec)))
    found = allocate(policy, other, other_stats, budget_bytes=uniform.file_bytes)
    assert found.file_bytes <= uniform.file_bytes
    heldout = data.windows("builtin", tied.tokenizer, context=64, count=8, split="heldout")
    mine, theirs = (
        evaluate(other, heldout, params=fake_quantize(other, allocation), reference=tied).mean_kld
        for allocation in (found, uniform)
    )
    assert mine < 0.9 * theirs
