"""Train a small decoder from nothing, on text that every Python installation has: a reference checkpoint.

    python launch/pretrain.py --config=configs/ref_llama.py --output=runs/ref-llama [--workdir=DIR] [--data=TEXT]
    python launch/pretrain.py --report=ref-llama [--count=N] [--context=N] [--data=TEXT] [--json=FILE]

`--output` receives a Hugging Face directory, `--workdir` (default: OUTPUT.run) the state; a run that was stopped goes
on with the same command. `load_model("ref-llama")` and every --model flag find it in runs/ or in the folder that
RAMP_REFS names; those that come with the package need no training. --data is `stdlib` (the standard library's source
and three quarters of its topics), `stdlib:NAME,NAME` (only those modules), `builtin`, a text file, or
hf:NAME:CONFIG:SPLIT; its last fifth is held out. --report shows what each uniform allocation costs a model on
held-out text.
"""

import json
from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax import data as texts
from ramp_jax.config import from_dict
from ramp_jax.files import write_bytes
from ramp_jax.refs import make

_CONFIG = cli.define_config(make.PretrainConfig)
_OUTPUT = flags.DEFINE_string("output", None, "New folder that receives the checkpoint.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds the run's state; default: OUTPUT.run.")
_DATA = flags.DEFINE_string("data", None, "Text instead of the config's: stdlib, builtin, a text file, or hf:...")
_REPORT = flags.DEFINE_string("report", None, "Show what uniform allocations cost this model instead of training.")
_COUNT = flags.DEFINE_integer("count", 32, "Held-out windows for --report.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of a window for --report.", lower_bound=6)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers of --report to this file.")


def main() -> None:
    if _REPORT.value:
        cli.refuse_flags(["config", "output", "workdir"], "with --report")
        _report()
    elif _CONFIG.value is None or _OUTPUT.value is None:
        raise ValueError("pass --config and --output to train, or --report=MODEL.")
    else:
        cli.refuse_flags(["count", "context", "json"], "without --report")
        _train()


def _train() -> None:
    values = _CONFIG.value.to_dict() | ({"data": _DATA.value} if _DATA.value else {})
    config, output = from_dict(values, make.PretrainConfig), Path(_OUTPUT.value)
    cli.announce("float32", config.seed)
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else output.with_name(output.name + ".run")
    if workdir.resolve() == output.resolve():
        raise ValueError("--workdir and --output are one folder; choose another for the state of the run.")
    found = make.make_checkpoint(config, workdir, output)
    print(
        f"Held-out text: {found['heldout_nll']:.4f} nats per token, {found['bits_per_byte']:.3f} bits per byte "
        f"({found['heldout_tokens']:,} tokens)"
    )
    print(f"Checkpoint: {output}")


def _report() -> None:
    if _JSON.value:
        cli.check_output_path(_JSON.value, models=[_REPORT.value], files=[_DATA.value])
    model = cli.load(_REPORT.value)
    workflow.check_context(_CONTEXT.value, model.spec.context_length)
    data = _DATA.value or "stdlib"
    windows = texts.windows(
        data, model.tokenizer, context=_CONTEXT.value, count=_COUNT.value, split="heldout", bos="text"
    )
    rows = make.level_table(model, windows)
    print(make.text_table(rows))
    if _JSON.value:
        write_bytes(Path(_JSON.value), (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
