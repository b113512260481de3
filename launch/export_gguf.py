"""Write a GGUF with the formats of an allocation; stock llama.cpp runs it.

    python launch/export_gguf.py --model=REF --allocation=alloc.json --output=model.gguf
        [--encoder=reference|best|compensated] [--imatrix=FILE] [--trust_calibration]

Weights are rounded by the encoder that the allocation records. What calibration saw is found again on the windows that
the allocation records; --imatrix takes an importance matrix of llama.cpp (GGUF or .dat) instead. An allocation that
someone else made may name any file or data set as its text: one outside of the folder of this command is read only with
--trust_calibration. An export that was stopped goes on where it was.
"""

from absl import flags

from ramp_jax import cli, workflow

_MODEL = flags.DEFINE_string("model", None, "The model that the allocation was made for.")
_TOKENIZER = cli.define_tokenizer_from()
_ALLOCATION = flags.DEFINE_string("allocation", None, "What launch/allocate.py wrote.")
_OUTPUT = flags.DEFINE_string("output", None, "The GGUF to write.")
_ENCODER = cli.define_encoder()
_IMATRIX = flags.DEFINE_string("imatrix", None, "Importance matrix of the model, as llama-imatrix writes it.")
_TRUST = cli.define_trust_calibration()
cli.define_mesh()
cli.define_hosts()
flags.mark_flags_as_required(["model", "allocation", "output"])


def main() -> None:
    files = (_ALLOCATION.value, workflow.calibrated_on(_ALLOCATION.value), _IMATRIX.value, _TOKENIZER.value)
    output = cli.check_output_path(_OUTPUT.value, models=[_MODEL.value], files=files)
    model = cli.load(_MODEL.value, tokenizer_from=_TOKENIZER.value)
    size = workflow.export(model, _ALLOCATION.value, output, _ENCODER.value, _IMATRIX.value, _TRUST.value)
    print(f"{size:,} bytes: {output}")


if __name__ == "__main__":
    cli.run(main)
