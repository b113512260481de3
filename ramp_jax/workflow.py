"""The jobs that `launch/` runs, from files to files: train a policy, allocate with it, evaluate."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from ramp_jax import data as texts
from ramp_jax import hosts
from ramp_jax.allocation import (
    Allocation,
    Costs,
    Saved,
    calibration_text,
    costs,
    export_metadata,
    offered_levels,
    read_saved,
)
from ramp_jax.allocators import Actions, Allocator
from ramp_jax.allocators.allocator import RULES, by_formats
from ramp_jax.checkpoint import digest
from ramp_jax.config import RunConfig, WindowsConfig, as_dict, read_config
from ramp_jax.files import alone_in, rows_to, write_bytes
from ramp_jax.halo import llama_quantize
from ramp_jax.halo.compare import COMPARISON, Choose, read_comparison
from ramp_jax.halo.export import check_writable, export_gguf
from ramp_jax.halo.guard import Check, Guard, check
from ramp_jax.halo.recipe import write_recipe
from ramp_jax.halo.report import Facts, read_metrics
from ramp_jax.halo.shards import plan
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.journal import NOWHERE, Followed, Journal, beside, code_version
from ramp_jax.models import Model, load_model, store
from ramp_jax.models.decoder import weights_dtype
from ramp_jax.models.gguf_header import is_gguf
from ramp_jax.models.gguf_source import parts_beside
from ramp_jax.models.load import read_description
from ramp_jax.models.metadata import Metadata, plain
from ramp_jax.models.references import resolve
from ramp_jax.models.sketch import same, sketch
from ramp_jax.overrides import Override
from ramp_jax.policy import inference, train
from ramp_jax.policy.inference import Policy, load_policy
from ramp_jax.policy.refinement import refine
from ramp_jax.quantization import (
    DEFAULT_ENCODER,
    REFERENCE,
    Encoder,
    EncoderName,
    Stats,
    calibrate,
    calibrate_and_fold,
    fake_quantize,
    importance_of,
    recorded_encoder,
    refold,
    write_imatrix,
)
from ramp_jax.quantization.encoder_factory import calibration_windows
from ramp_jax.quantization.importance import Importance, read_imatrix
from ramp_jax.scoring import perplexity, variants
from ramp_jax.scoring.perplexity import Protocol
from ramp_jax.scoring.scores import numbers
from ramp_jax.sensitivity.exact import exact_sensitivity
from ramp_jax.sensitivity.fisher import fisher_sensitivity
from ramp_jax.sensitivity.table import Sensitivity

_REFINE_WINDOWS = 2  # of a true evaluation

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.msgpack"

Say = Callable[[str], None]


def tokens(model: Model, config: WindowsConfig, split: texts.Split) -> Int[np.ndarray, "W T"]:
    """The windows that a config asks for; raises `ValueError` where they are longer than the model's context, or it
    brings no tokenizer."""
    tokenizer = tokenizer_of(model)
    check_context(config.context, model.spec.context_length)
    return texts.windows(config.data, tokenizer, context=config.context, count=config.count, split=split)


def check_context(context: int, longest: int) -> None:
    """Raise `ValueError` where windows of `context` tokens are longer than a model's context."""
    if context > longest:
        raise ValueError(
            f"windows of {context} tokens are longer than the {longest} that the model was made for; choose a shorter "
            f"--context."
        )


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises `ValueError` where it has none, without which nothing is allocated or exported."""
    if model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so no text can be read and llama.cpp runs no file of it; add its tokenizer "
            "files, or name a GGUF of the same vocabulary with --tokenizer_from=FILE.gguf."
        )
    return model.tokenizer


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
    rounding = recorded_encoder(allocation, model, encoder, trust_calibration=trust_calibration)
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


def prepare(
    model: Model, calibration: WindowsConfig, fold_level: float | None, journal: Journal = NOWHERE
) -> tuple[Model, Stats]:
    """The model folded for `fold_level` or, where that is None, as it is, and the statistics that decided it."""
    windows = tokens(model, calibration, "calibration")
    if fold_level is None:
        return model, calibrate(model, windows, journal)
    return calibrate_and_fold(model, windows, fold_level, journal=journal)


def train_policy(config: RunConfig, workdir: Path, say: Say = print) -> Policy:
    """Load, calibrate, fold, measure and train; everything lands in `workdir`, and a stopped run goes on there.

    Raises `ValueError` where `workdir` holds a run of another config, `OSError` where another process works there.
    """
    claim(workdir, config)
    with alone_in(workdir):
        return _train_policy(config, workdir, say)


def _train_policy(config: RunConfig, workdir: Path, say: Say) -> Policy:
    if (workdir / inference.POLICY_FILE).is_file():
        say(f"{workdir} already holds the policy of this config.")
        return load_policy(workdir)
    models = [load_model(ref, config.dtype, config.tokenizer_from, resident=False) for ref in config.models]
    for model in models:
        tokenizer_of(model)
        for windows in (config.calibration, config.sensitivity):
            check_context(windows.context, model.spec.context_length)
    write_bytes(workdir / CONFIG, (json.dumps(as_dict(config), indent=1) + "\n").encode())
    tasks = tuple(
        prepare_task(ref, model.in_memory(), config, workdir, say)
        for ref, model in zip(config.models, models, strict=True)
    )
    say(f"Training on {' and '.join(config.models)} with levels {', '.join(f'{level:g}' for level in config.levels)}")
    log, key = rows_to(workdir / METRICS, "iteration"), jax.random.key(config.seed)
    best = train.run(key, tasks, config.train, log=log, checkpoint_path=workdir / CHECKPOINT)
    policy = Policy(best.actor, config.train.sac.hidden, config.levels, config.fold_level, config.models)
    policy.save(workdir)
    return policy


def prepare_task(ref: str, model: Model, config: RunConfig, workdir: Path, say: Say) -> train.Task:
    """What the policy learns on a model: calibrated, folded, measured and embedded."""
    say(f"Preparing {ref}")
    folded, stats = prepare(model, config.calibration, config.fold_level)
    encoder = REFERENCE if config.encoder == "reference" else Encoder(config.encoder, importance_of(model.spec, stats))
    table = sensitivity(folded, config, table_path(workdir, ref), say, encoder)
    task = train.Task(inference.problem(folded, stats, config.levels), jnp.asarray(table.kld, jnp.float32))
    if config.train.evaluator == "surrogate":
        return task
    windows = tokens(model, config.sensitivity, "calibration")
    table = costs(folded, config.levels)
    choices = variants.prepare(folded, model, windows, table, "sliding", encoder)
    return task._replace(true_loss=jax.tree_util.Partial(variants.mean_kld, choices))


def table_path(workdir: Path, ref: str) -> Path:
    """Where a run keeps the sensitivity table of one of its models."""
    return workdir / f"sensitivity-{Path(ref).name}.npz"


def claim(workdir: Path, config: RunConfig) -> None:
    """Make the folder; raises `ValueError` where it holds another run, `OSError` where it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {workdir} ({error.strerror}); choose another --workdir.") from error
    path = workdir / CONFIG
    check_writable(path)
    wanted = json.loads(json.dumps(as_dict(config)))
    if path.exists():
        found = json.loads(json.dumps(as_dict(read_config(path))))
        changed = [name for name in wanted if wanted[name] != found.get(name)]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with another {changed[0]} ({found.get(changed[0])}, not {wanted[changed[0]]}); "
                f"choose another --workdir or delete it."
            )


def sensitivity(model: Model, config: RunConfig, path: Path, say: Say, encoder: Encoder = REFERENCE) -> Sensitivity:
    """A table of a run, measured once in f32; one that was stopped goes on.

    Raises `ValueError` where `path` holds a table of other inputs.
    """
    windows = tokens(model, config.sensitivity, "calibration")
    say(f"What every tensor loses at every level ({config.sensitivity_method}), on {windows.size} tokens")
    measure = {"exact": exact_sensitivity, "fisher": fisher_sensitivity}[config.sensitivity_method]
    return measure(model.astype(jnp.float32), windows, config.levels, "sliding", path=path, encoder=encoder)


def allocate(
    model: Model,
    allocator: Allocator,
    budget_bytes: int,
    calibration: WindowsConfig,
    output: Path,
    ref: str,
    encoder: EncoderName = DEFAULT_ENCODER,
    overrides: Sequence[Override] = (),
) -> Allocation:
    """Calibrate, fold, allocate, and save the allocation; a job that was killed goes on where it was.

    `overrides` decide about single tensors before. No quantized model is run, but for as many of them on calibration
    text as the allocator evaluates. Raises `ValueError` where a killed job had other inputs.
    """
    check_writable(output)
    started, how = time.monotonic(), _seen(model, calibration)
    made = _made(allocator, model, ref, budget_bytes, encoder)
    inputs = job_inputs(model) | {
        "calibration tokens": how["tokens"],
        "level of folding": f"{allocator.fold_level}",
        "levels": " ".join(map(str, allocator.levels)),
    }
    with _journal(output, inputs) as journal:
        folded, stats = prepare(model, calibration, allocator.fold_level, journal)
        evaluate = None
        if allocator.evaluations:
            evaluate = _true_loss(model, folded, stats, calibration, costs(folded, allocator.levels, overrides))
        allocation = inference.allocate(
            allocator, folded, stats, budget_bytes=budget_bytes, overrides=overrides, evaluate=evaluate, journal=journal
        )
        allocation = dataclasses.replace(allocation, calibration=how, made={**allocation.made, **made})
        if hosts.index() == 0:
            allocation.save(output, seconds=allocator.seconds + time.monotonic() - started)
    return allocation


def _seen(model: Model, calibration: WindowsConfig) -> dict[str, Any]:
    """What an allocation records of its calibration."""
    seen: dict[str, Any] = {"text": texts.fingerprint(calibration.data)}
    seen["tokens"] = digest(tokens(model, calibration, "calibration"))
    if len(parts := texts.parts_of(calibration.data)) > 1:
        seen["texts"] = [texts.fingerprint(part.source) for part in parts]
    return as_dict(calibration) | seen


def _made(allocator: Allocator, model: Model, ref: str, budget_bytes: int, encoder: EncoderName) -> dict[str, Any]:
    """How an allocation is made, as its file says it."""
    return {
        "model": ref,
        "weights": sketch(model),
        "budget_bytes": budget_bytes,
        "encoder": encoder,
        "allocator": allocator.name,
        **({"allocator_sha256": allocator.sha256} if allocator.sha256 else {}),
        **({} if allocator.fold_level is None else {"fold_level": allocator.fold_level}),
        "refine_evals": allocator.evaluations,
    }


def is_made(
    path: Path,
    allocator: Allocator,
    model: Model,
    budget_bytes: int,
    calibration: WindowsConfig,
    encoder: EncoderName,
    overrides: Sequence[Override] = (),
) -> bool:
    """Whether a file holds the allocation that `allocate` would make of the same arguments."""
    saved: Mapping[str, Any] = read_saved(path)
    wanted = _made(allocator, model, "", budget_bytes, encoder) | {"overrides": tuple(overrides) or None}
    found = {name: saved.get(name) for name in wanted} | {"model": ""}
    seen = as_dict(calibration) | {"tokens": digest(tokens(model, calibration, "calibration"))}
    alike = same(saved.get("weights", ()), wanted.pop("weights"))
    del found["weights"]
    return alike and found == wanted and seen.items() <= dict(saved.get("calibration", {})).items()


def allocate_as(
    model: Model,
    path: str | Path,
    levels: tuple[float, ...],
    calibration: WindowsConfig,
    output: Path,
    ref: str,
    encoder: EncoderName = DEFAULT_ENCODER,
    *,
    evaluations: int = 0,
    fold_level: float | None = None,
) -> Allocation:
    """As `allocate`, with the types of a GGUF of the same model, whoever made it; the windows are for the encoder.

    True `evaluations` refine them among `levels` and the file's own types, in as many bytes. Without these and without
    folding no pass over the model is made. Raises as `Allocation.from_gguf`.
    """
    check_writable(output)
    started, path = time.monotonic(), resolve(path)
    known = Allocation.from_gguf(path, model)
    allocator = by_formats(f"types of {path.name}", model.spec, known.formats, levels, fold_level=fold_level)
    if evaluations or fold_level is not None:
        allocator = refine(allocator, evaluations) if evaluations else allocator
        return allocate(model, allocator, known.file_bytes, calibration, output, ref, encoder)
    made = _made(allocator, model, ref, known.file_bytes, encoder)
    known = dataclasses.replace(known, calibration=_seen(model, calibration), made=made)
    if hosts.index() == 0:
        known.save(output, seconds=time.monotonic() - started)
    return known


def chooser(source: str | Path, allocation: str | Path, model: Model) -> Choose:
    """How whoever made an allocation file chooses at other budgets; `source` names it, `model` is as it was loaded.

    Raises `ValueError` where `source` is not who made the file, as far as the file says.
    """
    saved = read_saved(allocation)
    overrides = saved.get("overrides", ())
    levels = offered_levels(saved) if source in (*RULES, inference.EVOLUTION) else ()
    allocator = inference.find_allocator(source, levels=levels or None, evaluations=saved.get("refine_evals", 0))
    made_by = saved.get("allocator")
    if (allocator.name, allocator.sha256) != (made_by, saved.get("allocator_sha256")):
        raise ValueError(
            f"{allocation} was made by {made_by}, and {source} is {allocator.name}; name with --source_policy who made "
            f"it, so that what is chosen at other budgets belongs to it."
        )

    def choose(folded: Model, stats: Stats, budgets: Sequence[int]) -> list[Allocation]:
        how = saved["calibration"]
        windows = WindowsConfig(how["data"], how["context"], how["count"])
        table = costs(folded, allocator.levels, overrides)
        evaluate = _true_loss(model, folded, stats, windows, table) if allocator.evaluations else None
        return inference.allocations(allocator, folded, stats, budgets, overrides, evaluate=evaluate)

    return choose


def facts(allocation: Path, workdir: Path | None = None, gguf: str | None = None) -> Facts:
    """What there is to report of an allocation: its file, and what a folder holds of comparison, training and table.

    A table of another model is left out. Raises `ValueError` where something of it is damaged.
    """
    saved = read_saved(allocation)
    found = Facts(saved, allocation, gguf or f"{allocation.stem}.gguf", _source(saved, workdir))
    if workdir is None:
        return found
    compared, metrics = workdir / COMPARISON, workdir / METRICS
    comparison = read_comparison(compared) if compared.is_file() else None
    table = table_path(workdir, saved.get("model", ""))
    measured = Sensitivity.load(table) if table.is_file() else None
    if comparison and comparison["allocation"] != saved["sha256"]:
        raise ValueError(
            f"{compared} compares another allocation than {allocation}; run launch/compare.py with this one."
        )
    found = dataclasses.replace(
        found,
        comparison=comparison,
        metrics=read_metrics(metrics) if metrics.is_file() else (),
        table=measured if measured and {*measured.tensors} <= saved["formats"].keys() else None,
    )
    exported = gguf or (found.ours.file if found.ours else None)
    return dataclasses.replace(found, gguf=exported or found.gguf)


def _source(saved: Saved, workdir: Path | None) -> str:
    """The `--source_policy` with which an allocation was made, as far as its file and a folder tell."""
    name = saved.get("allocator", "").removesuffix(", refined")
    if name in (*RULES, inference.EVOLUTION, llama_quantize.MIX):
        return name
    held = [inference.PRETRAINED] + ([str(workdir)] if workdir and (workdir / inference.POLICY_FILE).is_file() else [])
    sha256 = saved.get("allocator_sha256")
    return next((source for source in held if load_policy(source).allocator().sha256 == sha256), "DIR")


def calibrated_on(allocation: str | Path) -> str | None:
    """The name of the text that an allocation file was calibrated on, None where it does not say."""
    return read_saved(allocation).get("calibration", {}).get("data")


def write_importance(model: Model, calibration: WindowsConfig, output: Path) -> Importance:
    """Calibrate and write the importance matrix; a job that was killed goes on where it was.

    Raises `ValueError` where a killed job had other inputs.
    """
    windows = tokens(model, calibration, "calibration")
    with Journal(beside(output), job_inputs(model) | {"calibration tokens": digest(windows)}) as journal:
        importance = importance_of(model.spec, calibrate(model, windows, journal))
        write_imatrix(output, importance, calibration.data, calibration.count, calibration.context)
    return importance


def _journal(output: Path, inputs: dict[str, str]) -> Journal:
    """What process 0 writes beside its output and the others read."""
    own = Journal(beside(output), inputs) if hosts.index() == 0 else Followed(beside(output))
    hosts.barrier()
    return own


def export(
    model: Model,
    allocation: str | Path,
    output: Path,
    encoder: EncoderName | None = None,
    imatrix: str | Path | None = None,
    trust_calibration: bool = False,
    *,
    shard_bytes: int | None = None,
    recipe: Path | None = None,
) -> int:
    """Write the GGUF of an allocation file, rounded by `encoder` or as the file records; returns its size in bytes.

    `trust_calibration` lets the file name any text to calibrate on, `shard_bytes` divides it as `export_gguf` does,
    `recipe` is a folder for `write_recipe`, which comes first. A job that was killed goes on where it was; raises
    `ValueError` where that had other inputs.
    """
    loaded = Allocation.load(allocation, model)
    used = encoder or ("best" if imatrix else loaded.made.get("encoder", "reference"))
    loaded = dataclasses.replace(loaded, made={**loaded.made, "encoder": used})
    rounding = recorded_encoder(allocation, model, encoder, imatrix, trust_calibration=trust_calibration)
    inputs = job_inputs(model) | {
        "allocation": digest(np.frombuffer(Path(allocation).read_bytes(), np.uint8)),
        "encoder": f"{rounding.effort} {rounding.compensated}",
        "calibration": digest((dict(rounding.importance), rounding.windows)),
        "size of shards": str(shard_bytes),
    }
    if recipe is not None:
        write_recipe(model, loaded, recipe, rounding)
    with _journal(output, inputs) as journal:
        return export_gguf(model, loaded, output, rounding, journal, shard_bytes=shard_bytes)


def exported_files(model: Model, allocation: str | Path, output: Path, shard_bytes: int | None) -> list[Path]:
    """The files that `export` writes, the first of which programs are given.

    Raises `ValueError` where a tensor is larger than a file may be.
    """
    loaded = Allocation.load(allocation, model)
    return [shard.path for shard in plan(loaded, export_metadata(loaded), output, shard_bytes)]


def check_export(
    model: Model,
    allocation: str | Path,
    output: Path,
    heldout: WindowsConfig,
    guard: Guard = "check",
    imatrix: str | Path | None = None,
    trust_calibration: bool = False,
) -> Check:
    """Score an exported file on held-out text, beside llama.cpp's largest mix that fits: `halo.guard.check`."""
    loaded = Allocation.load(allocation, model)

    def importance() -> Importance:
        if imatrix is not None:
            return read_imatrix(imatrix, model.spec)
        windows = calibration_windows(loaded, model, trust_calibration=trust_calibration)
        return importance_of(model.spec, calibrate(model, windows))

    return check(model, loaded, output, tokens(model, heldout, "heldout"), importance, guard)


def job_inputs(model: Model) -> dict[str, str]:
    """What all steps of a long job on a model depend on."""
    return {
        "model": store.fingerprint(model.params),
        "folding": digest(model.folding),
        "dtype": str(weights_dtype(model.params)),
        "code": code_version(),
    }


def _true_loss(
    model: Model, folded: Model, stats: Stats, calibration: WindowsConfig, table: Costs
) -> Callable[[Actions], float]:
    """Mean KL divergence of level indices on the first calibration windows, rounded with importance."""
    few = dataclasses.replace(calibration, count=min(calibration.count, _REFINE_WINDOWS))
    encoder = Encoder("reference", importance_of(model.spec, stats))
    choices = variants.prepare(folded, model, tokens(model, few, "calibration"), table, encoder=encoder)
    return variants.measuring(choices)
