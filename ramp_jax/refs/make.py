"""A reference checkpoint from nothing but text: tokenizer, pretraining, its directory, and how it quantizes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ramp_jax import data as texts
from ramp_jax import pretrain, schema
from ramp_jax.allocation import from_levels
from ramp_jax.config import as_dict
from ramp_jax.files import alone_in, replacing, rows_to, write_bytes
from ramp_jax.formats import format_for
from ramp_jax.halo.export import check_writable
from ramp_jax.models import Model, allocatable, load_model, save_model, tensors
from ramp_jax.models.spec import describe, make_spec
from ramp_jax.pretrain import OptimizerConfig
from ramp_jax.quantization import fake_quantize
from ramp_jax.scoring.perplexity import evaluate, reference_of

RUN, TOKENIZER, CHECKPOINT, METRICS, RESULT = "run.json", "tokenizer", "state.msgpack", "metrics.jsonl", "result.json"
END = "<|endoftext|>"
LEVELS = (2, 3, 4, 4.5, 5, 6, 8)

_HELDOUT_WINDOWS = 128
_TOKENIZER_SHARE = 0.6  # of the text's characters, from the start: well inside of the calibration part


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder of one family (see `DecoderSpec`)."""

    model_type: schema.Name = "llama"
    n_layers: schema.Count = 8
    d_model: schema.Count = 256
    n_heads: schema.Count = 4
    n_kv_heads: schema.Count = 2
    head_size: schema.Count = 64
    d_ff: schema.Count = 768
    tied: bool = True
    context_length: schema.Count = 512
    rope_theta: schema.Positive = 10000.0
    norm_eps: schema.Positive = 1e-6


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A checkpoint: its decoder, the text (`stdlib`, `stdlib:NAMES`, `builtin`, a file, `hf:...`), how it is trained.

    The tokenizer has at most `vocab_size` tokens; windows hold `context` tokens to predict.
    """

    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    data: schema.Name = "stdlib"
    vocab_size: schema.Count = 2048
    context: schema.Count = 512
    seed: Annotated[int, schema.within(0, 2**31 - 1)] = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


def make_checkpoint(
    config: PretrainConfig, workdir: Path, output: Path, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Train a checkpoint and save it as the new folder `output`; returns its held-out numbers.

    `workdir` holds the state; a run that was stopped goes on there. Raises `ValueError` where `workdir` holds another
    run, `FileExistsError` where `output` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already; delete it or choose another --output.")
    text = texts.read_text(config.data)
    _claim(workdir, as_dict(config) | {"text_sha256": hashlib.sha256(text.encode()).hexdigest()})
    with alone_in(workdir):
        return _make_checkpoint(config, text, workdir, output, say)


def _make_checkpoint(
    config: PretrainConfig, text: str, workdir: Path, output: Path, say: Callable[[str], None]
) -> dict[str, float]:
    tokenizer = _tokenizer(text, config.vocab_size, workdir / TOKENIZER, say)
    spec = make_spec(**as_dict(config.decoder), vocab_size=config.vocab_size)
    windows = _windows(config, tokenizer, "calibration")
    parameters = sum(t.size for t in tensors(spec))
    say(f"Pretraining {parameters:,} parameters, {config.optimizer.steps} steps, {len(windows)} windows of text")
    log, key = rows_to(workdir / METRICS, "step"), jax.random.key(config.seed)
    params = pretrain.run(key, spec, config.optimizer, windows, log=log, checkpoint_path=workdir / CHECKPOINT)
    trained = Model(spec, params, describe(spec, output.name, parameters), tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_model(trained, output)
    found = heldout(load_model(str(output)), config)
    write_bytes(workdir / RESULT, (json.dumps(found, indent=1) + "\n").encode())
    return found


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of exactly `vocab_size` tokens, digits one by one; llama.cpp knows its cuts as `smollm`.

    Raises `ValueError` where the text has too few pairs for that.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gives {backend.get_vocab_size()} tokens and {vocab_size} were asked for; "
            f"pass a longer text or ask for as many."
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)


def heldout(model: Model, config: PretrainConfig) -> dict[str, float]:
    """Nats per token and bits per byte of text that the checkpoint has not seen, in windows spread evenly over it."""
    windows = _windows(config, model.tokenizer, "heldout")
    count = min(len(windows), _HELDOUT_WINDOWS)
    windows = windows[np.arange(count) * len(windows) // count]
    nll = float(np.mean(evaluate(model, windows, protocol="sliding", doing="held-out text").nll))
    size = sum(len(model.tokenizer.decode(window).encode()) for window in windows)
    return {"heldout_nll": nll, "heldout_tokens": windows.size, "bits_per_byte": nll / np.log(2) * windows.size / size}


def level_table(
    model: Model, windows: Int[np.ndarray, "W T"], levels: Sequence[float] = LEVELS
) -> list[dict[str, float]]:
    """What every uniform allocation costs, importance and folding left out: one row per level that all tensors take."""
    members = allocatable(model.spec)
    reference = reference_of(model, windows, "sliding")
    rows = []
    for level in levels:
        if all(format_for(level, t.shape[-1]) for t in members):
            allocation = from_levels(model, [level] * len(members))
            params = fake_quantize(model, allocation)
            doing = f"level {level}"
            found = evaluate(model, windows, params=params, reference=reference, protocol="sliding", doing=doing)
            delta = found.nll - found.ref_nll
            rows.append(
                {
                    "level": level,
                    "linear_bpw": allocation.linear_bpw,
                    "nll": float(found.nll.mean()),
                    "delta_nll": float(delta.mean()),
                    "standard_error": float(delta.std() / np.sqrt(delta.size)),
                    "kld": found.mean_kld,
                }
            )
    return rows


def text_table(rows: Sequence[dict[str, float]]) -> str:
    """The rows of `level_table` for people."""
    lines = [f"{'level':>5}  {'linear bpw':>10}  {'NLL':>7}  {'Δ NLL':>18}  {'mean KL':>8}"]
    for row in rows:
        delta = f"{row['delta_nll']:.4f} ± {row['standard_error']:.4f}"
        lines.append(
            f"{row['level']:>5}  {row['linear_bpw']:>10.3f}  {row['nll']:>7.4f}  {delta:>18}  {row['kld']:>8.4f}"
        )
    return "\n".join(lines)


def _windows(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, split: texts.Split) -> Int[np.ndarray, "W T"]:
    """All windows of a split; those of training hold one token more, since the first is not predicted."""
    context = config.context + (split == "calibration")
    return texts.windows(config.data, tokenizer, context=context, count=None, split=split)


def _tokenizer(text: str, vocab_size: int, folder: Path, say: Callable[[str], None]) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file():
        say(f"Training a tokenizer of {vocab_size} tokens")
        trained = train_tokenizer(text[: int(len(text) * _TOKENIZER_SHARE)], vocab_size)
        with replacing(folder, folder=True) as temporary:
            trained.save_pretrained(temporary)
    return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)


def _claim(workdir: Path, wanted: dict[str, Any]) -> None:
    """Make the folder and write down what runs there; raises `ValueError` where it holds another run."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / RUN
    check_writable(path)
    wanted = json.loads(json.dumps(wanted))
    if path.exists():
        with schema.gate(path, "the config of a run", "choose another --workdir, or delete it"):
            found = schema.read(Mapping[str, Any], schema.read_json(path))
        if changed := [name for name in wanted if wanted[name] != found.get(name)]:
            raise ValueError(f"{workdir} holds a run with another {changed[0]}; choose another --workdir or delete it.")
    write_bytes(path, (json.dumps(wanted, indent=1) + "\n").encode())
