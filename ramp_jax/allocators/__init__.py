"""Ways of choosing a level for every weight matrix, behind one record; nothing here knows a policy or a file."""

from ramp_jax.allocators.allocator import Allocator, Problem
from ramp_jax.allocators.tables import Actions, Cost, Loss, Pairs

__all__ = ["Actions", "Allocator", "Cost", "Loss", "Pairs", "Problem"]
