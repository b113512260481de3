"""The suite `accelerator` of launch/benchmark.py: what 7B shapes take on one GPU or TPU, with random bf16 weights.

--accelerator_rows chooses from `matmul` (an 8192³ product, the peak that others are compared with), `encode` (all
weights to Q4_K, `reference`, one tensor after the other), `bytes` (how many blocks have ggml's bytes),
`forward` (perplexity of one window of 2,048 tokens), `compensate` (the seven matrices of one layer at level 3, fitted
on 8 windows) and `sensitivity` (six levels of three layers in the first, middle and last third, on 8 windows, from
which the table of all layers is extrapolated: costs are linear in the depth). Times are those of compiled functions.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from benchmarks.measuring import Numbers, medians, said, timed
from jaxtyping import Int

from ramp_jax.allocation import Allocation
from ramp_jax.formats import encode, format_for, get_format
from ramp_jax.halo import libggml, llama_quantize
from ramp_jax.models import DecoderSpec, Model, allocatable, lookup
from ramp_jax.models.decoder import cast_weights
from ramp_jax.models.layout import LOOKED_UP
from ramp_jax.models.spec import describe, make_spec
from ramp_jax.pretrain import init_params
from ramp_jax.quantization import calibrate, fake_quantize, importance_of, make_encoder
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.sensitivity.exact import exact_sensitivity

_ROWS = flags.DEFINE_list("accelerator_rows", None, "What the suite `accelerator` measures; default: everything.")

SPEC = make_spec(
    "llama",
    n_layers=32,
    d_model=4096,
    n_heads=32,
    n_kv_heads=32,
    head_size=128,
    d_ff=11008,
    vocab_size=32000,
    context_length=4096,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tied=False,
)
_CONTEXT, _WINDOWS = 2048, 8
_PRODUCT = 8192
_FORMAT, _LEVEL = "Q4_K", 3
_LEVELS = (2, 3, 4, 5, 6, 8)
_SAME_BYTES = ("Q4_K", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL")


def accelerator(repeats: int) -> Numbers:
    """The rows asked for, printed as they come."""
    rows: dict[str, Callable[[Model, int], Numbers]] = {
        "matmul": _matmul,
        "forward": _forward,
        "encode": _encode,
        "sensitivity": _sensitivity,
        "compensate": _compensate,
        "bytes": _bytes,
    }
    chosen = _ROWS.value or list(rows)
    if unknown := set(chosen) - set(rows):
        raise ValueError(f"--accelerator_rows names {min(unknown)!r}; choose from {', '.join(rows)}.")
    model = random_model(SPEC)
    numbers = said({"device": jax.devices()[0].device_kind, "weights": sum(t.size for t in allocatable(SPEC))})
    for name in chosen:
        with jax.default_matmul_precision("default"):
            numbers |= said(rows[name](model, repeats))
    return numbers


def random_model(spec: DecoderSpec) -> Model:
    """Random bf16 weights, drawn on the device."""
    params = jax.jit(lambda key: cast_weights(spec, init_params(key, spec), jnp.bfloat16))(jax.random.key(0))
    return Model(spec, params, describe(spec, "random", sum(t.size for t in allocatable(spec))), None)


def _matmul(model: Model, repeats: int) -> Numbers:
    del model
    a, b = jax.random.normal(jax.random.key(0), (2, _PRODUCT, _PRODUCT), jnp.bfloat16)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.bfloat16))
    seconds = medians({"product": lambda: [product(a, b) for _ in range(10)][-1].block_until_ready()}, repeats)
    return {"matmul_tflops": 10 * 2 * _PRODUCT**3 / seconds["product"] / 1e12}


def _encode(model: Model, repeats: int) -> Numbers:
    """Seconds for all weights, those of compilation beside them, and of one matrix with the wider search."""
    members = allocatable(model.spec)

    def all_weights() -> None:
        for tensor in members:
            jax.block_until_ready(encode(lookup(model.params, tensor).astype(jnp.float32), _FORMAT))

    first, _ = timed(all_weights)
    seconds, _ = timed(all_weights)
    widest = max((t for t in members if t.layer == 0), key=lambda t: t.size)
    w = lookup(model.params, widest).astype(jnp.float32)
    best = medians({"best": lambda: jax.block_until_ready(encode(w, _FORMAT, None, "best"))}, repeats)["best"]
    return {
        "encode_seconds": seconds,
        "encode_compile_seconds": first - seconds,
        "encode_gw_per_second": sum(t.size for t in members) / seconds / 1e9,
        "encode_best_gw_per_second": widest.size / best / 1e9,
    }


def _bytes(model: Model, repeats: int) -> Numbers:
    """Share of blocks whose bytes are ggml's or, where llama.cpp is not installed, those that XLA makes of the same
    program on the CPU (which says nothing on a CPU), on heavy-tailed weights."""
    del model, repeats
    w = (np.random.default_rng(0).standard_t(4, (256, SPEC.d_model)) * 0.02).astype(np.float32)
    with_ggml = llama_quantize.available()
    numbers: Numbers = {"bytes_compared_with": "ggml" if with_ggml else "the CPU"}
    for name in _SAME_BYTES:
        size = get_format(name).block_bytes
        here = get_format(name).to_bytes(encode(w, name)).reshape(-1, size)
        with jax.default_device(jax.devices("cpu")[0]):
            there = libggml.quantize(name, w) if with_ggml else get_format(name).to_bytes(encode(w, name))
        numbers[f"bytes_equal_{name}"] = float((here == there.reshape(-1, size)).all(-1).mean())
    return numbers


def _forward(model: Model, repeats: int) -> Numbers:
    """Of the arithmetic that the weights and causal attention ask for."""
    spec, windows = model.spec, _windows(model.spec, 1)
    seconds = medians({"all": lambda: evaluate(model, windows, protocol="sliding").nll}, repeats)["all"]
    read = sum(t.size for t in allocatable(spec) if t.reads != LOOKED_UP)
    attention = spec.n_layers * spec.n_heads * spec.head_size * 2 * windows.size**2  # two products, half of the keys
    tflops = (2 * read * windows.size + attention) / seconds / 1e12
    return {"forward_tokens_per_second": windows.size / seconds, "forward_tflops": tflops}


def _compensate(model: Model, repeats: int) -> Numbers:
    """One layer, behind an embedding of 256 tokens that costs nothing to round."""
    spec = dataclasses.replace(model.spec, n_layers=1, vocab_size=256, tied=True)
    params = {
        "token_embd": {"weight": model.params["token_embd"]["weight"][: spec.vocab_size]},
        "output_norm": model.params["output_norm"],
        "blk": {0: model.params["blk"][0]},
    }
    one, windows = Model(spec, params, model.metadata, None), _windows(spec, _WINDOWS)
    formats = {t.name: format_for(_LEVEL, t.shape[-1]).name for t in allocatable(spec) if t.layer is not None}
    allocation = Allocation(spec, model.metadata, formats | {"token_embd.weight": "F16"})
    encoder = make_encoder("compensated", windows, importance=importance_of(spec, calibrate(one, windows[:1])))
    seconds = medians({"one": lambda: fake_quantize(one, allocation, encoder)}, min(repeats, 2))["one"]
    return {"compensate_seconds": seconds}


def _sensitivity(model: Model, repeats: int) -> Numbers:
    del repeats
    depth, windows = len(model.spec.blocks), _windows(model.spec, _WINDOWS)

    def measure(layers: tuple[int, ...]) -> float:
        names = [t.name for t in allocatable(model.spec) if t.layer in layers]
        return exact_sensitivity(model, windows, _LEVELS, "sliding", tensors=names).seconds

    first = measure((depth - 1,))  # compiles what all layers share
    layers = (depth // 6, depth // 2, depth - 1 - depth // 6)
    seconds = measure(layers)
    return {
        "sensitivity_last_layer_with_compilation_seconds": first,
        "sensitivity_seconds_of_three_layers": seconds,
        "sensitivity_seconds": seconds / len(layers) * depth,
    }


def _windows(spec: DecoderSpec, count: int) -> Int[np.ndarray, "W T"]:
    return np.random.default_rng(0).integers(0, spec.vocab_size, (count, _CONTEXT)).astype(np.int32)
