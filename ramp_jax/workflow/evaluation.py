"""Losses and accuracies of a model, quantized as an allocation says."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ramp_jax import data as texts
from ramp_jax.allocation import Allocation, calibration_text, read_saved
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.models import Model, load_model
from ramp_jax.models.gguf_header import is_gguf
from ramp_jax.models.gguf_source import parts_beside
from ramp_jax.models.load import read_description
from ramp_jax.models.metadata import Metadata, plain
from ramp_jax.models.references import resolve
from ramp_jax.quantization import EncoderName, fake_quantize, recorded_encoder, refold
from ramp_jax.scoring import perplexity
from ramp_jax.scoring.perplexity import Protocol
from ramp_jax.scoring.scores import numbers
from ramp_jax.workflow.shared import calibrated_on, check_context, tokenizer_of


def evaluate(
    model: str | Path | Model,
    *,
    reference: str | Path | Model | None = None,
    allocation: str | Path | None = None,
    encoder: EncoderName | None = None,
    data: str = "builtin",
    split: texts.Split = "heldout",
    protocol: Protocol = "llama.cpp",
    context: int | None = None,
    count: int | None = None,
    backend: Literal["jax", "llama.cpp"] = "jax",
    dtype: str = "float32",
    tokenizer_from: str | None = None,
    trust_calibration: bool = False,
) -> dict[str, Any]:
    """Perplexity of a model on a text and, with `reference`, how far it is from that: the dict of `scores.numbers`.

    The model is first quantized as the `allocation` file says, by the `encoder` that it records unless one is named.
    `context` is 512 for llama.cpp's protocol and 2,048 for sliding unless given; `count` windows, by default all. With
    `backend="llama.cpp"` a GGUF runs there, its reference in JAX. `tokenizer_from` is a GGUF whose tokenizer cuts the
    text. `trust_calibration` lets the allocation name any text to calibrate on, not only built-in ones, files in the
    working folder and `data`. Raises `ValueError` or an `OSError` where an input does not serve.
    """
    context = context or (512 if protocol == "llama.cpp" else 2048)
    if backend == "llama.cpp":
        if allocation or isinstance(model, Model) or not is_gguf(model := resolve(str(model))):
            raise ValueError("llama.cpp scores a .gguf; make one with launch/export_gguf.py and evaluate that.")
        metadata, tokenizer = read_description(model, tokenizer_from)
        described = plain(metadata)
        longest = described.get(f"{described.get('general.architecture')}.context_length")
        check_context(context, longest if isinstance(longest, int) else context)
        model = parts_beside(model)[0]  # pyrefly: ignore [bad-argument-type]
        _check_unseen(metadata, None, data, split)
    else:
        model = _loaded(model, dtype, tokenizer_from)
        _check_unseen(model.metadata, allocation, data, split)
        trusted = trust_calibration or (allocation is not None and calibrated_on(allocation) == data)
        model = _quantized(model, allocation, encoder, trusted)
        tokenizer = tokenizer_of(model)
        check_context(context, model.spec.context_length)
    bos = "window" if protocol == "llama.cpp" else "text"
    windows = texts.windows(data, tokenizer, context=context, count=count, split=split, bos=bos)
    reference = None if reference is None else _loaded(reference, dtype)
    if backend == "llama.cpp":
        scored = evaluate_gguf(model, windows, reference=reference, protocol=protocol)  # pyrefly: ignore [bad-argument-type]
    else:
        scored = perplexity.evaluate(model, windows, reference=reference, protocol=protocol)  # pyrefly: ignore [bad-argument-type]
    how = {"protocol": protocol, "context": context, "windows": len(windows), "data": data, "split": split}
    return numbers(scored) | how | {"backend": backend, "dtype": dtype if backend == "jax" else None}


def evaluate_tasks(
    model: str | Path | Model,
    names: Sequence[str],
    *,
    reference: str | Path | Model | None = None,
    allocation: str | Path | None = None,
    encoder: EncoderName | None = None,
    folder: Path | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    tokenizer_from: str | None = None,
    trust_calibration: bool = False,
) -> dict[str, dict[str, float]]:
    """Accuracy on lm-eval's tasks and, with `reference`, the share retained of its: the rows of `tasks.compared`.

    Tasks are lm-eval's, `passages`, and those of the YAML files in `folder`; `limit` takes the first examples of each.
    Raises `RuntimeError` where lm-eval is not installed, else as `tasks.accuracies`.
    """
    try:
        from ramp_jax.scoring import tasks
    except ImportError as error:
        raise RuntimeError(f"lm-eval is not installed ({error}); run `pip install 'ramp-jax[tasks]'`.") from error
    loaded = _loaded(model, dtype, tokenizer_from).in_memory()
    tokenizer_of(loaded)
    quantized = _quantized(loaded, allocation, encoder, trust_calibration)
    found = tasks.accuracies(quantized, names, folder=folder, limit=limit)
    aim = None if reference is None else _loaded(reference, dtype, tokenizer_from).in_memory()
    return tasks.compared(found, None if aim is None else tasks.accuracies(aim, names, folder=folder, limit=limit))


def _loaded(model: str | Path | Model, dtype: str, tokenizer_from: str | None = None) -> Model:
    return model if isinstance(model, Model) else load_model(str(model), dtype, tokenizer_from)


def _quantized(
    model: Model, allocation: str | Path | None, encoder: EncoderName | None, trust_calibration: bool
) -> Model:
    """The model folded and fake-quantized as the file says, or with another encoder; as it is without a file."""
    if allocation is None:
        return model
    loaded = Allocation.load(allocation, model)
    rounding = recorded_encoder(loaded, model, encoder, trust_calibration=trust_calibration)
    params = fake_quantize(model, loaded, rounding)
    return dataclasses.replace(refold(model, loaded.folding), params=params)


def _check_unseen(metadata: Metadata, allocation: str | Path | None, data: str, split: texts.Split) -> None:
    """Raise `ValueError` where a model would be scored on the text that it was calibrated on, whatever its name."""
    if split == "heldout":
        return
    known: dict[str, set[str]] = {}
    if (text := calibration_text(metadata)) is not None:
        known["the file"] = {text}
    if allocation and (how := read_saved(allocation).get("calibration")):
        known[str(allocation)] = {how["text"], *how.get("texts", ())}
    # A text that nobody was calibrated on is not read for this.
    found = {texts.fingerprint(name) for name in (data, *(p.source for p in texts.parts_of(data)))} if known else set()
    if named := [name for name, seen in known.items() if seen & found]:
        raise ValueError(
            f"{named[-1]} was calibrated on the first four fifths of {data!r}; score it with --split=heldout or on "
            f"another text."
        )
