"""Which format every weight matrix gets: the file that says so, and what choices and the finished GGUF weigh."""

from ramp_jax.allocation.allocation import Allocation, calibration_text, export_metadata
from ramp_jax.allocation.cost_table import (
    Costs,
    bytes_for_bits,
    check_budget,
    costs,
    from_actions,
    from_levels,
    worthwhile,
)
from ramp_jax.allocation.saved import (
    Calibration,
    Choice,
    EncoderName,
    FoldLevel,
    FormatName,
    Levels,
    Saved,
    offered_levels,
    read_saved,
)
from ramp_jax.allocation.sizes import ALIGNMENT, fallback, header_of, info_bytes, padded, tensor_bytes

__all__ = [
    "ALIGNMENT",
    "Allocation",
    "Calibration",
    "Choice",
    "Costs",
    "EncoderName",
    "FoldLevel",
    "FormatName",
    "Levels",
    "Saved",
    "bytes_for_bits",
    "calibration_text",
    "check_budget",
    "costs",
    "export_metadata",
    "fallback",
    "from_actions",
    "from_levels",
    "header_of",
    "info_bytes",
    "offered_levels",
    "padded",
    "read_saved",
    "tensor_bytes",
    "worthwhile",
]
