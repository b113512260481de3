"""The decoder's twin in transformers: of the family's own class, with our weights and our logits."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from benchmarks import zoo
from scipy.special import log_softmax

from ramp_jax.halo.torch_model import token_losses, torch_model
from ramp_jax.models import load_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FAMILIES = ("llama untied", "llama tied", "qwen3 untied", "qwen3 tied", "gemma tied")
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM"}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """Of the family, its head its own or the embedding."""
    family, head = request.param.split()
    if family == "llama":
        return request.getfixturevalue(head)
    found = load_model(str(tiny.save(tiny.family_model(family), tmp_path_factory.mktemp("hf") / family)))
    if found.spec.tied == (head == "tied"):
        return found
    params = {name: tree for name, tree in found.params.items() if name != "output"}
    return dataclasses.replace(found, spec=dataclasses.replace(found.spec, tied=True), params=params)


@pytest.fixture(scope="module")
def twin(model):
    return torch_model(model)


@pytest.mark.parametrize("length", [24, 150])  # 150: more than one block of queries
def test_logits_are_ours(model, twin, rng, length):
    ids = rng.integers(0, tiny.VOCABULARY, (2, length))
    with torch.inference_mode():
        theirs = twin(torch.from_numpy(ids)).logits.numpy()
    assert np.ptp(theirs) > 5
    np.testing.assert_allclose(model.logits(ids.astype(np.int32)), theirs, atol=1e-4, rtol=0)


def test_it_is_of_the_family_s_class_with_the_weights_of_the_checkpoint(model, twin):
    family = model.spec.architecture
    assert type(twin).__name__ == CLASSES[family]
    assert twin.config.tie_word_embeddings == model.spec.tied
    assert not twin.training
    state = twin.state_dict()
    original = tiny.hf_model(model.spec.tied) if family == "llama" else tiny.family_model(family)
    for name, value in original.state_dict().items():
        if not (name == "lm_head.weight" and model.spec.tied):
            np.testing.assert_allclose(state[name], value, atol=1e-6, rtol=0, err_msg=name)
    head, embedding = state["lm_head.weight"], state["model.embed_tokens.weight"]
    assert torch.equal(head, embedding) == model.spec.tied


@pytest.mark.parametrize("start", [0, 12])
def test_token_losses_are_those_of_our_logits(model, twin, windows, start):
    log_p = log_softmax(np.asarray(model.logits(windows), np.float64), axis=-1)[:, start:-1]
    expected = -np.take_along_axis(log_p, windows[:, start + 1 :, None], axis=-1)[..., 0]
    found = token_losses(twin, windows, start)
    assert found.shape == (3, 23 - start)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


KINDS = ("llama-llama3", "ministral", "smollm3", "gemma2", "gemma3-vision", "phi4-mini", "olmo2", "granite")
"""With what a twin needs beside weights: tables of positions, scales, caps, windows, fused matrices."""


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_checkpoint_in_transformers(name, tmp_path, rng):
    twin = torch_model(load_model(str(zoo.save(zoo.hf_model(name), tmp_path / name))))
    ids = rng.integers(0, zoo.VOCABULARY, (1, 50))
    with torch.inference_mode():
        found = twin(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(found, zoo.hf_logits(name, ids), atol=1e-4, rtol=0)


def test_weights_of_any_dtype_become_f32(untied, windows):
    twin = torch_model(untied.astype("bfloat16"))
    assert {value.dtype for value in twin.state_dict().values()} == {torch.float32}
    low = torch_model(untied)
    for name, value in twin.state_dict().items():
        expected = low.state_dict()[name]
        assert torch.equal(value, expected if "norm" in name else expected.bfloat16().float()), name
