"""ggml's own quantizer through ctypes: the oracle of byte parity, and what encoders are timed against.

Needs the `verify` extra (llama-cpp-python).
"""

import ctypes
import functools
from pathlib import Path

import gguf
import numpy as np

from ramp_jax.halo.llama_quantize import require


@functools.cache
def _library() -> ctypes.CDLL:
    require()
    import llama_cpp

    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return lib


def quantize(name: str, w: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Bytes `[rows, row_bytes]` of w `[rows, I]`, weighted by `importance` `[I]`, by `ggml_quantize_chunk`.

    Rows must be whole blocks, or ggml ends the process. Releases the GIL.
    """
    kind = gguf.GGMLQuantizationType[name]
    size, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    w = np.ascontiguousarray(w, np.float32)
    out = np.empty((w.shape[0], w.shape[1] // size * size_bytes), np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    pointer = None if importance is None else importance.ctypes.data
    _library().ggml_quantize_chunk(int(kind), w.ctypes.data, out.ctypes.data, 0, *w.shape, pointer)
    return out


def dequantize(name: str, raw: np.ndarray) -> np.ndarray:
    """Weights f32 `[rows, I]` of raw `[rows, row_bytes]`."""
    size, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = np.ascontiguousarray(raw)
    out = np.empty((raw.shape[0], raw.shape[1] // size_bytes * size), np.float32)
    spelled = name[:-1] + "K" if name.endswith("_K") else name.lower()
    function = getattr(_library(), f"dequantize_row_{spelled[0].lower() + spelled[1:]}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    function(raw.ctypes.data, out.ctypes.data, out.size)
    return out
