"""Perplexity of a model, and with --reference its KL divergence from another one.

    python launch/evaluate.py --model=REF [--allocation=alloc.json] [--reference=REF] [--data=builtin|FILE|hf:N:C:S]
        [--protocol=llama.cpp|sliding] [--context=N] [--count=8] [--backend=jax|llama.cpp] [--json=FILE]

With --allocation, the model is quantized as the allocation says. --protocol=llama.cpp scores the second half of every
window as llama-perplexity does, sliding every token as papers do; the two are not comparable. --backend=llama.cpp runs
a .gguf in llama.cpp. Text is the held-out part of --data, which calibration never sees.
"""

import json
from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.allocation import Allocation
from ramp_jax.checkpoint import write_bytes
from ramp_jax.config import WindowsConfig
from ramp_jax.evaluation.perplexity import evaluate, reference_of
from ramp_jax.halo.export import check_writable
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.quantization import fake_quantize, refold

_MODEL = flags.DEFINE_string("model", None, "The model: directory, hub id, .gguf, or a name that works offline.")
_ALLOCATION = flags.DEFINE_string("allocation", None, "Quantize the model like this before scoring it.")
_REFERENCE = flags.DEFINE_string("reference", None, "The model whose predictions are the aim.")
_DATA = flags.DEFINE_string("data", "builtin", "Text: builtin, a text file, or hf:NAME:CONFIG:SPLIT.")
_PROTOCOL = flags.DEFINE_enum("protocol", "llama.cpp", ["llama.cpp", "sliding"], "Which tokens count.")
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of a window; default: 512 for llama.cpp, 2048 for sliding.", lower_bound=4
)
_COUNT = flags.DEFINE_integer("count", 8, "Windows.", lower_bound=1)
_BACKEND = flags.DEFINE_enum("backend", "jax", ["jax", "llama.cpp"], "What runs the model.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Data type of the matrices in JAX; auto is the fastest here.")
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")
flags.mark_flags_as_required(["model"])


def main() -> None:
    if _BACKEND.value == "llama.cpp" and (_ALLOCATION.value or not _MODEL.value.endswith(".gguf")):
        raise ValueError(
            "--backend=llama.cpp scores a .gguf; make one with launch/export_gguf.py and pass it as --model."
        )
    if _JSON.value:
        check_writable(Path(_JSON.value))
    context = _CONTEXT.value or (512 if _PROTOCOL.value == "llama.cpp" else 2048)
    model = cli.load(_MODEL.value, _DTYPE.value)
    windows = workflow.tokens(model, WindowsConfig(_DATA.value, context, _COUNT.value), "heldout")
    reference = None
    if _REFERENCE.value:
        reference = reference_of(cli.load(_REFERENCE.value, _DTYPE.value), windows, _PROTOCOL.value)
    if _BACKEND.value == "llama.cpp":
        scored = evaluate_gguf(_MODEL.value, windows, reference=reference, protocol=_PROTOCOL.value)
    else:
        params = None
        if _ALLOCATION.value:
            allocation = Allocation.load(_ALLOCATION.value, model)
            model = refold(model, allocation.folding)
            params = fake_quantize(model, allocation)
        scored = evaluate(model, windows, params=params, reference=reference, protocol=_PROTOCOL.value)
    numbers = {"ppl": scored.ppl, "ppl_stderr": scored.ppl_stderr, "nll": scored.mean_nll, "kld": scored.mean_kld}
    numbers |= {"tokens": scored.nll.size, "protocol": _PROTOCOL.value, "context": context, "data": _DATA.value}
    print(f"Perplexity {scored.ppl:.4f} ± {scored.ppl_stderr:.4f} on {scored.nll.size:,} tokens")
    if scored.kld is not None:
        print(f"Mean KL divergence from {_REFERENCE.value}: {scored.mean_kld:.6f} nats per token")
    if _JSON.value:
        write_bytes(Path(_JSON.value), (json.dumps(numbers, indent=1) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
