"""What a script reads and where it writes."""

from collections.abc import Iterable
from pathlib import Path

import jax

from ramp_jax import __version__
from ramp_jax.halo.export import check_writable
from ramp_jax.models import Model, load_model
from ramp_jax.models.load import fast_dtype
from ramp_jax.models.references import model_files
from ramp_jax.resources import check_output
from ramp_jax.workflow import tokenizer_of


def announce(dtype: str, seed: int = 0) -> None:
    """Print in one line what a log is of no use without: versions, devices, the dtype of matrices, the seed."""
    found = jax.local_devices()
    where = f"{len(found)} x {found[0].device_kind}"
    dtype = fast_dtype() if dtype == "auto" else dtype
    print(f"ramp_jax {__version__}, jax {jax.__version__}, {where}, {dtype}, seed {seed}", flush=True)


def load(ref: str, dtype: str = "float32", tokenizer_from: str | None = None) -> Model:
    """`load_model`, saying so: large models take a while. Raises `ValueError` where it has no vocabulary."""
    announce(dtype)
    print(f"Loading {ref}", flush=True)
    model = load_model(ref, dtype, tokenizer_from)
    tokenizer_of(model)
    return model


def check_output_path(path: str | Path, *, models: Iterable[str | None] = (), files: Iterable[str | None] = ()) -> Path:
    """The path of a file that a script will write, of whose inputs some are models and some files, as flags name them.

    Raises `OSError` where it cannot be written, `ValueError` where it is one of the inputs.
    """
    path = Path(path).expanduser()
    check_writable(path)
    inputs = [Path(file).expanduser() for file in files if file]
    check_output(path, inputs + [file for ref in models if ref for file in model_files(ref)])
    return path
