"""Write the importance matrix of a model: the mean squared activation of every linear's input channels.

    python launch/calibrate.py --model=REF --output=imatrix.gguf [--data=builtin|FILE|hf:NAME:CONFIG:SPLIT]
        [--context=N] [--count=N]

The file is a GGUF that llama-quantize --imatrix and launch/export_gguf.py --imatrix read. A run that was stopped goes
on where it was.
"""

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.config import WindowsConfig
from ramp_jax.data import parts_of

_MODEL = flags.DEFINE_string("model", None, "The model: directory, hub id, .gguf, or a name that works offline.")
_TOKENIZER = cli.define_tokenizer_from()
_OUTPUT = flags.DEFINE_string("output", None, "Where the importance matrix goes (.gguf).")
_DATA = flags.DEFINE_string("data", "builtin", cli.TEXTS)
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of a calibration window.", lower_bound=2)
_COUNT = flags.DEFINE_integer("count", 8, "Calibration windows.", lower_bound=1)
flags.mark_flags_as_required(["model", "output"])


def main() -> None:
    output = cli.check_output_path(
        _OUTPUT.value, models=[_MODEL.value], files=[*(part.source for part in parts_of(_DATA.value)), _TOKENIZER.value]
    )
    model = cli.load(_MODEL.value, tokenizer_from=_TOKENIZER.value)
    config = WindowsConfig(_DATA.value, _CONTEXT.value, _COUNT.value)
    importance = workflow.write_importance(model, config, output)
    print(f"{len(importance)} tensors, {config.count * config.context:,} tokens: {output}")


if __name__ == "__main__":
    cli.run(main)
