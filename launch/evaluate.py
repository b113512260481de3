"""Perplexity of a model or its accuracy on tasks, and with --reference how far it is from another one.

    python launch/evaluate.py --model=REF [--allocation=alloc.json [--encoder=NAME] [--trust_calibration]]
        [--reference=REF] [--backend=jax|llama.cpp]
        [--data=builtin|FILE|hf:NAME:CONFIG:SPLIT] [--split=heldout|all] [--protocol=llama.cpp|sliding] [--context=N]
        [--count=N] [--json=FILE]
    python launch/evaluate.py --model=REF [--allocation=alloc.json] [--reference=REF] --tasks=piqa,hellaswag,winogrande
        [--task_path=DIR] [--limit=N] [--json=FILE]

With --allocation, the model is quantized as the allocation says; --backend=llama.cpp runs a .gguf in llama.cpp.
--protocol=llama.cpp scores the second half of every window as llama-perplexity does, sliding every token as papers do;
the two are not comparable. Text is the last fifth of --data, which calibration never sees, or all of a test set:

    python launch/evaluate.py --model=model.gguf --reference=path/or/hub-id --protocol=sliding
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:test --split=all

--tasks are lm-eval's (extra `tasks`), whose data comes from the hub; those of the YAML files in --task_path, with data
wherever they say; and `passages`, which needs neither: true and false endings of passages of the built-in text.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.files import write_bytes
from ramp_jax.scoring import scores

_MODEL = flags.DEFINE_string("model", None, "The model: directory, hub id, .gguf, or a name that works offline.")
_TOKENIZER = cli.define_tokenizer_from()
_ALLOCATION = flags.DEFINE_string("allocation", None, "Quantize the model like this before scoring it.")
_ENCODER = cli.define_encoder()
_REFERENCE = flags.DEFINE_string("reference", None, "The model whose predictions are the aim.")
_DATA = flags.DEFINE_string("data", "builtin", "Text: builtin, a text file, or hf:NAME:CONFIG:SPLIT.")
_SPLIT = flags.DEFINE_enum("split", "heldout", ["heldout", "all"], "Which part of the text.")
_PROTOCOL = flags.DEFINE_enum("protocol", "llama.cpp", ["llama.cpp", "sliding"], "Which tokens count.")
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of a window; default: 512 for llama.cpp, 2048 for sliding.", lower_bound=6
)
_COUNT = flags.DEFINE_integer("count", None, "Windows, spread evenly over the text; default: all.", lower_bound=1)
_BACKEND = flags.DEFINE_enum("backend", "jax", ["jax", "llama.cpp"], "What runs the model.")
_DTYPE = cli.define_dtype(
    "float32", "Data type of the matrices in JAX: auto is the fastest here, stored the checkpoint's."
)
_TASKS = flags.DEFINE_list("tasks", [], "Measure accuracy on these instead of perplexity.")
_TASK_PATH = flags.DEFINE_string("task_path", None, "A folder with more tasks: lm-eval's YAML files.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first examples of each task.", lower_bound=2)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")
_TRUST = cli.define_trust_calibration()
cli.define_mesh()
flags.mark_flags_as_required(["model"])


def main() -> None:
    if not _ALLOCATION.value:
        cli.refuse_flags(["encoder", "trust_calibration"], "without --allocation")
    if _JSON.value:
        text = workflow.calibrated_on(_ALLOCATION.value) if _ALLOCATION.value else None
        files = (_ALLOCATION.value, text, _DATA.value, _TOKENIZER.value)
        cli.check_output_path(_JSON.value, models=[_MODEL.value, _REFERENCE.value], files=files)
    cli.announce(_DTYPE.value)
    found, table = _tasks() if _TASKS.value else _perplexity()
    print(table)
    if _JSON.value:
        write_bytes(Path(_JSON.value), (json.dumps(found, indent=1) + "\n").encode())


def _perplexity() -> tuple[dict[str, Any], str]:
    cli.refuse_flags(["task_path", "limit"], "without --tasks")
    if _BACKEND.value == "llama.cpp" and not _REFERENCE.value:
        cli.refuse_flags(["dtype", "mesh"], "by llama.cpp, without --reference")
    found = workflow.evaluate(
        _MODEL.value,
        reference=_REFERENCE.value,
        allocation=_ALLOCATION.value,
        encoder=_ENCODER.value,
        data=_DATA.value,
        split=_SPLIT.value,
        protocol=_PROTOCOL.value,
        context=_CONTEXT.value,
        count=_COUNT.value,
        backend=_BACKEND.value,
        dtype=_DTYPE.value,
        tokenizer_from=_TOKENIZER.value,
        trust_calibration=_TRUST.value,
    )
    return found, scores.text_table(found)


def _tasks() -> tuple[dict[str, Any], str]:
    if _BACKEND.value == "llama.cpp":
        raise ValueError("--tasks runs in JAX only; leave --backend out.")
    cli.refuse_flags(["data", "split", "protocol", "context", "count"], "with --tasks")
    found = workflow.evaluate_tasks(
        _MODEL.value,
        _TASKS.value,
        reference=_REFERENCE.value,
        allocation=_ALLOCATION.value,
        encoder=_ENCODER.value,
        folder=Path(_TASK_PATH.value) if _TASK_PATH.value else None,
        limit=_LIMIT.value,
        dtype=_DTYPE.value,
        tokenizer_from=_TOKENIZER.value,
        trust_calibration=_TRUST.value,
    )
    from ramp_jax.scoring.tasks import text_table

    return found, text_table(found)


if __name__ == "__main__":
    cli.run(main)
