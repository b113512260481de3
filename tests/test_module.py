"""The Flax module around a decoder: the same tree, the same logits, gradients, and state that goes in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny
from flax import nnx

from ramp_jax.models import DecoderModule, decoder, load_model, tensors

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", params=["untied", "tied", "qwen3", "gemma"])
def model(request, tmp_path_factory):
    if request.param in ("untied", "tied"):
        return request.getfixturevalue(request.param)
    return load_model(str(tiny.save(tiny.family_model(request.param), tmp_path_factory.mktemp("hf") / "model")))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_state_is_the_tree_of_parameters(model):
    module = DecoderModule(model.spec, model.params)
    same(nnx.to_pure_dict(nnx.split(module)[1]), model.params)
    same(module.params, model.params)


def test_parameters_have_the_names_of_the_file(model):
    module = DecoderModule(model.spec, model.params)
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert {".".join(map(str, path)) for path, _ in state} == {t.name for t in tensors(model.spec)}
    attention = module.blk[2].attn_q
    np.testing.assert_array_equal(attention.weight[...], model.params["blk"][2]["attn_q"]["weight"])


def test_logits_are_the_model_s(model, windows):
    module = DecoderModule(model.spec, model.params)
    np.testing.assert_allclose(module(windows), model.logits(windows), atol=1e-4)
    np.testing.assert_allclose(nnx.jit(lambda m, ids: m(ids))(module, windows), model.logits(windows), atol=1e-4)


def mean_nll(module, ids):
    return optax.softmax_cross_entropy_with_integer_labels(module(ids[:, :-1]), ids[:, 1:]).mean()


def test_steps_along_gradients_lower_the_loss(model, windows):
    module = DecoderModule(model.spec, model.params)
    optimizer = nnx.Optimizer(module, optax.adam(1e-3), wrt=nnx.Param)
    ids = jnp.asarray(windows)

    @nnx.jit
    def step(module, optimizer):
        value, gradient = nnx.value_and_grad(mean_nll)(module, ids)
        optimizer.update(module, gradient)
        return value

    losses = [float(step(module, optimizer)) for _ in range(4)]
    assert losses[0] == pytest.approx(float(mean_nll(DecoderModule(model.spec, model.params), ids)), rel=1e-4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), module.params, model.params)
    assert all(jax.tree.leaves(moved))
    np.testing.assert_allclose(decoder.logits(model.spec, module.params, ids), module(ids), atol=1e-5)


def test_module_with_another_state(model, windows):
    """Merged with other values it computes with them, and the module that was split keeps its own."""
    module = DecoderModule(model.spec, model.params)
    graph, state = nnx.split(module)
    louder = jax.tree.map(lambda a: 1.1 * a, model.params)
    nnx.replace_by_pure_dict(state, louder)
    merged = nnx.merge(graph, state)
    same(merged.params, louder)
    np.testing.assert_array_equal(merged(windows), decoder.logits(model.spec, louder, windows))
    assert not np.allclose(merged(windows), module(windows), atol=0.1)
    np.testing.assert_array_equal(module(windows), model.logits(windows))


def test_state_goes_through_orbax(untied, tmp_path):
    _, state = nnx.split(DecoderModule(untied.spec, untied.params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    empty = nnx.eval_shape(lambda: DecoderModule(untied.spec, jax.tree.map(jnp.zeros_like, untied.params)))
    definition, shapes = nnx.split(empty)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", shapes)
    same(nnx.merge(definition, restored).params, untied.params)
