"""Which rows of a block's tensors lie on which device, from the layout alone.

A matrix `[out, in]` is cut along `model` by its rows, each of which is computed as on one device; what a matrix reads
is never cut (`devices.whole`). Gains and biases, and matrices that are too small, lie on every device.
"""

from jax.sharding import PartitionSpec as P

from ramp_jax import devices
from ramp_jax.models.layout import Block, Params, Weight, of_block, replace_in_block

_ROWS = 64
"""Rows that matrix products compute together: a device's share is a multiple, else sums run in another order there."""


def spec_of(weight: Weight, parts: int) -> P:
    """The axes of one tensor where the mesh has `parts` devices along `model`."""
    cut = weight.kind == "matrix" and weight.shape[0] % (parts * _ROWS) == 0
    return P(devices.MODEL) if cut else P()


def placed(block: Block, w: Params) -> Params:
    """A block's tensors on the devices of the mesh; with one device, as they are."""
    if devices.current() is None:
        return w
    parts = devices.width(devices.MODEL)
    return replace_in_block(w, {x.name: devices.placed(of_block(w, x.name), spec_of(x, parts)) for x in block.weights})
