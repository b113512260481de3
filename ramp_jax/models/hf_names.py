"""Where the text decoder of a Hugging Face checkpoint stands among its tensors, and what else may be there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from ramp_jax.models.layout import Tensor, tensors
from ramp_jax.models.safetensors_source import SafetensorsSource
from ramp_jax.models.source import check_used, some
from ramp_jax.models.spec import DecoderSpec

_BODY, _HEAD = "model.", "lm_head.weight"
_ROPE_TABLE = ".rotary_emb."
"""Part of the names of buffers that older transformers saved, and that a config describes as well."""

_TOWER = re.compile("vision|visual|image|video|audio|speech")


def find_decoder(
    spec: DecoderSpec, config: Mapping[str, Any], source: SafetensorsSource, folder: Path
) -> dict[Tensor, str]:
    """The source's name of every tensor of the decoder that it holds.

    The body of the decoder begins where the embedding stands, be it `model.`, `language_model.model.` or nothing. What
    the config's vision or audio towers need beside it is left out and named in a warning. Raises `ValueError` where
    tensors are left that nobody reads.
    """
    embedding = _in_body(spec, tensors(spec)[0])
    prefix = _ending_in(embedding, source, folder, _BODY + embedding).removesuffix(embedding)
    names = {}
    for tensor in tensors(spec):
        name = spec.family.hf_name(tensor)
        inside = name.startswith(_BODY)
        found = prefix + _in_body(spec, tensor) if inside else _ending_in(name, source, folder, name)
        if found in source.shapes:
            names[tensor] = found
    left = {name for name in source.shapes if _ROPE_TABLE not in f".{name}"} - set(names.values())
    left -= _copies_of_the_embedding(spec, source, left, names.get(tensors(spec)[0]), folder)
    if any(_TOWER.search(key) and isinstance(value, Mapping) for key, value in config.items()):
        body = {_first(_in_body(spec, tensor)) for tensor in names}
        beside = {name for name in left if not (name.startswith(prefix) and _first(name.removeprefix(prefix)) in body)}
        if beside:
            parts = {_first(name.removeprefix(_BODY)) for name in beside}
            logging.warning("%s: only its text decoder is loaded; left out: %s.", folder, some(parts))
        left -= beside
    check_used(spec.architecture, left, folder)
    return names


def _in_body(spec: DecoderSpec, tensor: Tensor) -> str:
    return spec.family.hf_name(tensor).removeprefix(_BODY)


def _first(name: str) -> str:
    return name.split(".")[0]


def _ending_in(name: str, source: SafetensorsSource, folder: Path, default: str) -> str:
    """The only tensor outside towers of which `name` is the end, `default` where there is none."""
    found = [key for key in source.shapes if f".{key}".endswith(f".{name}") and not _TOWER.search(key)]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {some(found)}, of which a text decoder has one; use another checkpoint.")
    return found[0] if found else default


def _copies_of_the_embedding(
    spec: DecoderSpec, source: SafetensorsSource, left: set[str], embedding: str | None, folder: Path
) -> set[str]:
    """Heads that are stored although they are the embedding; raises `ValueError` where their values are others."""
    if not spec.tied or embedding is None:
        return set()
    heads = {name for name in left if f".{name}".endswith(f".{_HEAD}") and not _TOWER.search(name)}
    if others := [name for name in heads if not source.equal(name, embedding)]:
        raise ValueError(
            f"{folder}: {some(others)} differs from {embedding}, to which config.json ties it; set tie_word_embeddings "
            f"to false there, or delete the tensor."
        )
    return heads
