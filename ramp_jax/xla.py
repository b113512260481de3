"""XLA's flags for what the project computes. Imported first, since XLA reads them once, at JAX's first device.

Reductions on CPUs are not compiled with YNN, whose fusions compute wrong sums in jaxlib 0.10.2 and 0.11.0: from about a
million elements on, a sum over an axis that is fused with what is broadcast to it is wrong by several per cent, without
an error (jax-ml/jax#39103): the gradient of an RMS norm under `vmap`, for one. Matrix products stay with YNN, which is
fastest for bfloat16.

Matrix products on GPUs go to cuBLAS alone. Trying Triton's kernels for each of them made the first pass of a 7B model
take 40 s instead of 4.
"""

import os

import jaxlib.version

_FLAGS = {"--xla_cpu_experimental_ynn_fusion_type": "-reduce", "--xla_gpu_enable_triton_gemm": "false"}
_KNOWN = ((0, 10, 2), (0, 12, 0))  # an XLA that does not know a flag refuses to start


def set_flags(version: tuple[int, ...] = jaxlib.version.__version_info__) -> None:
    """Add the flags for a jaxlib that knows them, but those that XLA_FLAGS says something about already."""
    flags = os.environ.get("XLA_FLAGS", "")
    named = {flag.partition("=")[0] for flag in flags.split()}
    missing = [f"{name}={value}" for name, value in _FLAGS.items() if name not in named]
    if _KNOWN[0] <= version < _KNOWN[1] and missing:
        os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


set_flags()
