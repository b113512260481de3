"""Names of models from which llama.cpp takes that white space behind special tokens is stripped."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny

from ramp_jax.allocation import Allocation
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import load_model
from ramp_jax.models.metadata import plain, typed
from ramp_jax.models.tokenizers import name_for_llama_cpp, tokenizer_from_directory, tokenizer_from_gguf

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks import tokenizers as suite
from benchmarks.tokenizer_kinds import KINDS, VOCABULARY, lines

PHI_3 = KINDS["Phi-3"]
ASCII = [line for line in lines(PHI_3.specials, 500) if not PHI_3.apart(line)]


def exported(model, path):
    export_gguf(model, Allocation.uniform(model, "F16"), path)
    return path


@pytest.mark.parametrize(
    ("name", "changed"), [("phi3", "Phi 3"), ("my-Phi-3-test", "My Phi 3 Test"), ("phi-2", "Phi 2")]
)
def test_a_model_that_is_called_phi_3_and_lacks_its_tokens_loads_in_llama_cpp(
    tmp_path, untied_directory, name, changed
):
    folder = shutil.copytree(untied_directory, tmp_path / name)
    path = exported(load_model(folder), tmp_path / "out.gguf")
    assert plain(load_model(path).metadata)["general.name"] == changed
    with suite.vocabulary(path) as (library, vocabulary):
        assert library.llama_vocab_n_tokens(vocabulary) == tiny.VOCABULARY


def test_a_gguf_that_is_called_phi_3_and_lacks_its_tokens_is_exported_so_that_llama_cpp_loads_it(tmp_path, untied):
    source = tiny.write_gguf(
        tmp_path / "a.gguf", untied.metadata | typed({"general.name": "PHI3"}), tiny.gguf_values(False)
    )
    with pytest.raises(RuntimeError, match="could not load"), suite.vocabulary(source):
        pass
    model = load_model(source)
    path = exported(model, tmp_path / "out.gguf")
    with suite.llama_cpp(path) as encode:
        assert model.tokenizer("a <|im_end|> b")["input_ids"] == encode("a <|im_end|> b")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("checkpoint-300", "Phi-3 checkpoint-300"),
        ("tuned-phi3", "tuned-phi3"),
        ("Phi-3", "Phi-3"),
        ("Phi 3 Mini", "Phi-3 Mini"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_tokenizer_that_strips_as_phi_3_s_does_strips_in_llama_cpp(tmp_path, name, changed, alone):
    PHI_3.build(tmp_path)
    if alone:
        saved = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
        config = {"added_tokens_decoder": {token["id"]: token for token in saved}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").unlink()
    tokenizer, pairs = tokenizer_from_directory(tmp_path, VOCABULARY)
    assert name_for_llama_cpp(name, tokenizer, pairs) == changed
    path = suite.write_vocabulary(tmp_path / "v.gguf", pairs, changed)
    fields = plain(pairs) | {"general.name": changed}
    again = tokenizer_from_gguf(fields, path)
    assert name_for_llama_cpp(changed, again, pairs) == changed
    with suite.llama_cpp(path) as encode:
        for text in ASCII:
            assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == encode(text)


def test_a_tokenizer_that_strips_nothing_strips_nothing_in_llama_cpp(tmp_path):
    """Though it has all the tokens of Phi-3, and its folder the name."""
    PHI_3.build(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    for token in saved["added_tokens"]:
        token["rstrip"] = False
    path.write_text(json.dumps(saved))
    tokenizer, pairs = tokenizer_from_directory(tmp_path, VOCABULARY)
    name = name_for_llama_cpp("phi-3-mine", tokenizer, pairs)
    assert name == "phi 3-mine"
    with suite.llama_cpp(suite.write_vocabulary(tmp_path / "v.gguf", pairs, name)) as encode:
        for text in ASCII:
            assert tokenizer(text)["input_ids"] == encode(text)


def test_a_name_without_a_vocabulary_stays():
    assert name_for_llama_cpp("phi-3", None, {}) == "phi-3"
