"""Write a GGUF with the formats of an allocation; stock llama.cpp runs it.

python launch/export_gguf.py --model=REF --allocation=alloc.json --output=model.gguf
"""

from pathlib import Path

from absl import flags

from ramp_jax import cli
from ramp_jax.allocation import Allocation
from ramp_jax.halo.export import check_writable, export_gguf

_MODEL = flags.DEFINE_string("model", None, "The model that the allocation was made for.")
_ALLOCATION = flags.DEFINE_string("allocation", None, "What launch/allocate.py wrote.")
_OUTPUT = flags.DEFINE_string("output", None, "The GGUF to write.")
flags.mark_flags_as_required(["model", "allocation", "output"])


def main() -> None:
    output = Path(_OUTPUT.value)
    check_writable(output)
    model = cli.load(_MODEL.value)
    size = export_gguf(model, Allocation.load(_ALLOCATION.value, model), output)
    print(f"{size:,} bytes: {output}")


if __name__ == "__main__":
    cli.run(main)
