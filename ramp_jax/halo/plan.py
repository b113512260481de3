"""What a job would make and need, told before any of it: the plan of a dry run, for people and as JSON for programs."""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import jax.numpy as jnp
import numpy as np

from ramp_jax import schema
from ramp_jax.allocation import Allocation, Costs, fallback, from_actions
from ramp_jax.allocators import Actions, Allocator, Problem
from ramp_jax.allocators.simple import uniform
from ramp_jax.cores import cores
from ramp_jax.halo.footprint import Device, Runtime, footprint, weight_bytes
from ramp_jax.models import DecoderSpec, Model, allocatable, tensors
from ramp_jax.models.decoder import weights_dtype
from ramp_jax.overrides import Override

VERSION = 1
_MAKE_IT = "make one with launch/allocate.py --dry_run --json=FILE"
_CONTEXTS = (2_048, 8_192, 32_768)

# Of allocate.py on CPUs: SmolLM2-135M, shapes of Qwen2.5-1.5B and Llama-2-7B, 4,096 tokens (WORKSPACE_NOTES.md).
_SECONDS_PER_WEIGHT = 0.45e-6  # of one core, with estimates; 0.36 to 0.55
_SIZES_ALONE = 0.4  # of that, where nobody looks at estimates: a forward pass and the search of the folding
_SECONDS_PER_TOKEN = 1.8e-11  # and weight, of one core: a forward pass
_MEASURED_TOKENS = 4_096
_START = 10  # seconds of imports and of programs that are compiled already
_PROCESS, _BLOCKS = 2.2e9, 4  # bytes of the process, and blocks that lie in memory at once
_EVALUATED_WINDOWS = 2


class Memory(TypedDict):
    """Bytes that llama.cpp takes to run the file, on its device: weights, KV cache and buffers."""

    context: schema.Count
    parallel: schema.Count
    keys: str
    values: str
    flash_attention: bool
    device: Device
    weights: schema.Bytes
    cache: Annotated[int, schema.within(0, 2**50)]
    compute: Annotated[int, schema.within(0, 2**50)]
    output: Annotated[int, schema.within(0, 2**50)]
    total: schema.Bytes


class Example(TypedDict):
    """A file of the size asked for. `chosen_by` says whose choice it is: the allocator's own where that needs sizes
    alone, else that of `uniform`, one level for all, in whose place estimates will put a better mixture."""

    chosen_by: schema.Name
    file_bytes: schema.Bytes
    linear_bpw: schema.Positive
    file_bpw: schema.Positive
    code_bits: schema.Positive
    share: Mapping[str, schema.Share]
    formats: Mapping[str, str]


class Plan(TypedDict):
    """What an allocator would do with a model: sizes in bytes, `seconds` and `work_memory` of the job.

    These two are scaled from jobs that were measured on CPUs, by weights, tokens and usable cores: within a factor of
    about two there, and not measured on accelerators.
    """

    version: Literal[1]
    model: schema.Name
    allocator: schema.Name
    smallest_bytes: schema.Bytes
    largest_bytes: schema.Bytes
    budget_bytes: NotRequired[schema.Bytes]
    overrides: tuple[Override, ...]
    fallback: NotRequired[str]
    example: NotRequired[Example]
    memory: tuple[Memory, ...]
    seconds: schema.NotNegative
    work_memory: schema.Bytes


def make_plan(
    model: Model, ref: str, allocator: Allocator, table: Costs, budget_bytes: int | None, runtime: Runtime, tokens: int
) -> Plan:
    """The plan of allocating for `budget_bytes`, calibrated on so many `tokens`; without a budget only what is known.

    Memory is listed for some contexts up to that of `runtime`.
    """
    smallest, largest = allocator.reach(model, table)
    plan = Plan(
        version=VERSION,
        model=ref,
        allocator=allocator.name,
        smallest_bytes=smallest,
        largest_bytes=largest,
        overrides=table.overrides,
        memory=(),
        seconds=_seconds(model.spec, allocator, tokens),
        work_memory=_work_memory(model, allocator, table),
    )
    if budget_bytes is None:
        return plan
    name, found = _example(model, allocator, table, budget_bytes)
    example = Example(
        chosen_by=name,
        file_bytes=found.file_bytes,
        linear_bpw=found.linear_bpw,
        file_bpw=found.file_bpw,
        code_bits=found.code_bits,
        share=_shares(found),
        formats=dict(found.formats),
    )
    contexts = sorted({*(c for c in _CONTEXTS if c < runtime.context), runtime.context})
    memory = tuple(_memory(found, runtime.of(context)) for context in contexts)
    plan["budget_bytes"], plan["example"], plan["memory"] = budget_bytes, example, memory
    if said := fallback(model.spec, found.formats, found.linear_bpw):
        plan["fallback"] = said
    return plan


def read_plan(path: str | Path) -> Plan:
    """A plan from its JSON; raises `ValueError` for any other file."""
    with schema.gate(path, "a plan", _MAKE_IT):
        return schema.read(Plan, schema.read_json(path))


def plan_json(plan: Plan) -> str:
    """The JSON that `read_plan` reads."""
    return json.dumps(plan, indent=1) + "\n"


def described(plan: Plan) -> str:
    """The plan in lines for people."""
    lines = [
        f"Work: about {_time(plan['seconds'])} and {plan['work_memory'] / 2**30:.1f} GiB of memory on this machine"
    ]
    if (example := plan.get("example")) is None:
        return lines[0]
    whose = f"as {example['chosen_by']} would choose"
    if example["chosen_by"] != plan["allocator"]:
        whose += f"; {plan['allocator']} needs calibration to choose"
    shares = ", ".join(f"{fmt} {share:.1%}" for fmt, share in example["share"].items())
    lines.append(
        f"File: {example['file_bytes']:,} bytes, {example['linear_bpw']:.3f} bits per weight ({whose}): {shares}"
    )
    for row in plan["memory"]:
        parts = ", ".join(f"{name} {row[name]:,}" for name in ("weights", "cache", "compute", "output") if row[name])
        tokens = f"{row['parallel']} x {row['context']:,} tokens"
        lines.append(f"Memory of the {row['device']} for {tokens}: {row['total']:,} bytes ({parts})")
    return "\n".join(lines)


def _example(model: Model, allocator: Allocator, table: Costs, budget_bytes: int) -> tuple[str, Allocation]:
    """Whose choice, and which: sizes are all that is known."""
    alone = allocator.sees == "sizes" and not allocator.evaluations
    name, choose = (allocator.name, allocator.choose) if alone else ("uniform", _uniform)
    cost = jnp.asarray(table.in_units, jnp.int32)
    members = allocatable(model.spec)
    importance = {tensor.name: np.ones(tensor.shape[-1], np.float32) for tensor in members}
    nothing = jnp.zeros(cost.shape)
    known = Problem(nothing, nothing[:, 0], cost, nothing[0], nothing, model=model, importance=importance)
    return name, from_actions(model, table, choose(known, table.units(budget_bytes)))


def _uniform(problem: Problem, budget: int) -> Actions:
    return uniform(np.asarray(problem.cost, np.int64), np.asarray(problem.expected), budget)


def _shares(found: Allocation) -> dict[str, float]:
    """Of the allocated weights, by format, the largest first."""
    members = allocatable(found.spec)
    weights = collections.Counter()
    for tensor in members:
        weights[found.format_of(tensor)] += tensor.size
    return {fmt: count / weights.total() for fmt, count in weights.most_common()}


def _memory(found: Allocation, runtime: Runtime) -> Memory:
    beside = footprint(found.spec, runtime)
    weights = weight_bytes(found, runtime.device)
    output = 0 if runtime.device == "gpu" else beside.output
    return Memory(
        context=runtime.context,
        parallel=runtime.parallel,
        keys=runtime.keys,
        values=runtime.values,
        flash_attention=runtime.flash_attention,
        device=runtime.device,
        weights=weights,
        cache=beside.cache,
        compute=beside.compute,
        output=output,
        total=weights + beside.cache + beside.compute + output,
    )


def _seconds(spec: DecoderSpec, allocator: Allocator, tokens: int) -> float:
    weights = sum(tensor.size for tensor in tensors(spec))
    once = weights * _SECONDS_PER_WEIGHT * (_SIZES_ALONE if allocator.sees == "sizes" else 1.0)
    more = weights * _SECONDS_PER_TOKEN * (tokens - _MEASURED_TOKENS)
    evaluated = allocator.evaluations * weights * _SECONDS_PER_TOKEN * min(tokens, _EVALUATED_WINDOWS * 512)
    return _START + (max(once + more, 0.0) + evaluated) / cores()


def _work_memory(model: Model, allocator: Allocator, table: Costs) -> int:
    """Bytes that the job takes at its peak: with true evaluations, the weights once per level."""
    size = jnp.dtype(weights_dtype(model.params)).itemsize if model.params else 2
    largest = max(sum(int(np.prod(weight.shape)) for weight in block.weights) for block in model.spec.blocks)
    variants = sum(int(row.sum()) * t.size for row, t in zip(table.valid, allocatable(model.spec), strict=True))
    return int(_PROCESS + size * (_BLOCKS * largest + (variants if allocator.evaluations else 0)))


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
