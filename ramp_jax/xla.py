"""Keeps XLA from compiling reductions on CPUs with YNN, whose fusions compute wrong sums in jaxlib 0.10.2 and 0.11.0.

From about a million elements on, a sum over an axis that is fused with what is broadcast to it is wrong by several
per cent, without an error (jax-ml/jax#39103): the gradient of an RMS norm under `vmap`, for one. Matrix products stay
with YNN, which is fastest for bfloat16. Imported first, since XLA reads its flags once, at JAX's first device.
"""

import os

import jaxlib.version

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_KNOWN = ((0, 10, 2), (0, 12, 0))  # an XLA that does not know a flag refuses to start


def avoid_wrong_fusions(version: tuple[int, ...] = jaxlib.version.__version_info__) -> None:
    """Set the flag for a jaxlib that needs it, unless XLA_FLAGS says something about it already."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _KNOWN[0] <= version < _KNOWN[1] and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=-reduce".strip()


avoid_wrong_fusions()
