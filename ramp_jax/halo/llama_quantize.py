"""Work handed to llama.cpp itself: its own type mixes, with the importance matrix of our calibration.

Needs the `verify` extra (llama-cpp-python).
"""

import contextlib
import ctypes
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from jaxtyping import Int

from ramp_jax import files
from ramp_jax.allocation import Allocation, Costs, padded
from ramp_jax.allocators import Actions, Allocator, Problem
from ramp_jax.allocators.allocator import FOLD_LEVEL, MIX
from ramp_jax.allocators.tables import Cost, total
from ramp_jax.cores import cores
from ramp_jax.formats import EXPORTABLE, Format, get_format
from ramp_jax.halo.export import export_gguf, write_skeleton
from ramp_jax.models import Model, allocatable
from ramp_jax.quantization.importance import Importance

_NAMES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M")
_NAMES += ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M")
_NAMES += ("Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
MIXES = {name: int(gguf.LlamaFileType[f"MOSTLY_{name}"]) for name in _NAMES}
"""llama.cpp's names of its mixes → `llama_ftype`, the better ones of equal size first."""


def available() -> bool:
    """Whether llama.cpp can be called."""
    try:
        require()
    except RuntimeError:
        return False
    return True


def require() -> None:
    """Raise `RuntimeError` where llama.cpp cannot be called."""
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(f"llama.cpp is not installed ({error}); run `pip install 'ramp-jax[verify]'`.") from error


def quantize(
    source: Path,
    output: Path,
    mix: str,
    importance: Importance | None = None,
    types: Mapping[str, str] | None = None,
) -> int:
    """Quantize an F16 or F32 GGUF with one of llama.cpp's mixes; returns the size of `output` in bytes.

    `types` names the formats of tensors that the mix is not to decide. Raises `ValueError` for an unknown mix,
    `RuntimeError` where llama.cpp refuses.
    """
    with files.replacing(output) as temporary:
        _call(source, temporary, mix, importance, types or {}, dry_run=False)
    return output.stat().st_size


def predicted_bytes(source: Path, importance: Importance | None = None) -> dict[str, int]:
    """What a file of each mix weighs, metadata as in the source."""
    stored = {t.name: (int(t.n_elements), int(t.shape[0]), int(t.n_bytes)) for t in gguf.GGUFReader(source).tensors}
    sizes = {}
    for mix in MIXES:
        changed = 0
        for name, fmt in mix_types(source, mix, importance).items():
            weights, n_in, size = stored[name]
            changed += padded(weights // n_in * get_format(fmt).row_bytes(n_in)) - padded(size)
        sizes[mix] = source.stat().st_size + changed
    return sizes


class Mixes(NamedTuple):
    """llama.cpp's mixes of the model that `source` holds in F16, with an importance matrix."""

    source: Path
    importance: Importance

    @classmethod
    def of(cls, model: Model, importance: Importance, folder: Path) -> "Mixes":
        """Writes the model in F16 into the folder; raises as `export_gguf`."""
        source = folder / "F16.gguf"
        export_gguf(model, Allocation.uniform(model, "F16"), source)
        return cls(source, importance)

    def below(self, budget_bytes: int) -> str | None:
        """The largest that fits the budget, None where none does."""
        sizes = predicted_bytes(self.source, self.importance)
        fitting = [mix for mix in MIXES if sizes[mix] <= budget_bytes]
        return max(fitting, key=sizes.__getitem__, default=None)

    def write(self, mix: str, path: Path | None = None) -> Path:
        """The mix of that name, by default beside the source."""
        path = path or self.source.with_name(f"{mix}.gguf")
        quantize(self.source, path, mix, self.importance)
        return path


def mix_allocator() -> Allocator:
    """The largest of llama.cpp's mixes that fits; what rounds its types is up to the encoder.

    Where a type is masked, the nearest in bytes that is not takes its place. Its choice and its reach raise
    `RuntimeError` where llama.cpp is not installed, its choice `ValueError` where no mix fits.
    """
    return Allocator(MIX, EXPORTABLE, FOLD_LEVEL, _largest_mix, sees="sizes", reach=_reach)


def _largest_mix(problem: Problem, budget: int) -> Actions:
    cost = np.asarray(problem.cost, np.int64)
    choices = _mixes(problem.model, cost, problem.importance)
    sizes = [int(total(cost, actions)) for actions in choices]
    fitting = [size for size in sizes if size <= budget]
    if not fitting:
        raise ValueError("none of llama.cpp's mixes fits the budget; choose a larger one.")
    return choices[sizes.index(max(fitting))]


def _reach(model: Model, table: Costs) -> tuple[int, int]:
    """The smallest mix and the largest file: a mix's types depend on whether there is importance, not on its values."""
    importance = {t.name: np.ones(t.shape[-1], np.float32) for t in allocatable(model.spec)}
    sizes = [total(table.in_units, actions) for actions in _mixes(model, table.in_units, importance)]
    return table.fixed + table.unit * int(min(sizes)), table.largest


def _mixes(model: Any, cost: Cost, importance: Importance | None) -> list[Actions]:
    """Of every mix, the place of each tensor's type in `EXPORTABLE`."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "F16.gguf"
        write_skeleton(model, Allocation.uniform(model, "F16"), source)
        for mix in MIXES:
            types = mix_types(source, mix, importance)
            wanted = [get_format(types[tensor.name]) for tensor in allocatable(model.spec)]
            found.append(np.asarray([_nearest(row, fmt) for row, fmt in zip(cost, wanted, strict=True)]))
    return found


def _nearest(row: Int[np.ndarray, " A"], wanted: Format) -> int:
    """The place of a format, or where it is masked that of the unmasked one with as many bits per weight or nearly."""
    apart = [abs(get_format(name).bits_per_weight - wanted.bits_per_weight) for name in EXPORTABLE]
    return min(np.flatnonzero(row), key=lambda a: (EXPORTABLE[a] != wanted.name, apart[a]))


def mix_types(source: Path, mix: str, importance: Importance | None = None) -> dict[str, str]:
    """Format of every tensor of an F16 or F32 GGUF in one of llama.cpp's mixes, by its dry run.

    With an importance matrix llama.cpp takes other types for some tensors.
    """
    log = _call(source, source.with_suffix(".dry"), mix, importance, {}, dry_run=True)
    lines = re.findall(r"\] +(\S+) +- \[[^]]*\], type = +(\w+), size = [^\n]*?(?:\((\w+)\))?\n", log)
    return {name: (new or old).upper() for name, old, new in lines}


def _call(
    source: Path, output: Path, mix: str, importance: Importance | None, types: Mapping[str, str], *, dry_run: bool
) -> str:
    """Run `llama_model_quantize`; returns what it logged."""
    require()
    import llama_cpp

    if mix not in MIXES:
        raise ValueError(f"llama.cpp has no mix {mix!r}; known mixes are {', '.join(MIXES)}.")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.nthread = MIXES[mix], dry_run, cores()
    if importance:
        entries = _imatrix(importance)
        params.imatrix = entries
    if types:
        patterns = _overrides(types)
        params.tt_overrides = patterns
        for name, field in {"token_embd.weight": "token_embedding_type", "output.weight": "output_tensor_type"}.items():
            if name in types:
                setattr(params, field, int(get_format(types[name]).ggml_type))
    with captured_log() as log:
        failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {mix}: {last_line(log)}")
    return "".join(log)


def _imatrix(importance: Importance) -> Any:
    """A C array of entries that ends with an empty one, as `llama_model_quantize` reads it."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def pattern(name: str) -> str:
    """A regular expression that fits the tensor of this name and no other."""
    return f"^{re.escape(name)}$"


def _overrides(types: Mapping[str, str]) -> Any:
    """A C array of patterns, one per tensor, that ends with an empty one."""
    import llama_cpp

    entries = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, fmt) in zip(entries, types.items(), strict=False):
        entry.pattern, entry.type = pattern(name).encode(), int(get_format(fmt).ggml_type)
    return entries


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect what llama.cpp logs instead of printing it."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def last_line(log: list[str]) -> str:
    """What llama.cpp said last."""
    lines = "".join(log).strip().splitlines()
    return lines[-1] if lines else "it did not say why"
