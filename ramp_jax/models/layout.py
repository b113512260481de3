"""What a decoder is made of: blocks in a row, each of sub-blocks that know their tensors and compute themselves.

A sub-block (a mixer of tokens or an MLP) is a frozen dataclass: its fields say what it computes, its `weights` which
tensors that takes, its `activations` what its matrices read and who makes that, and calling it is the pure function
from the residual stream before it to the stream after it. Equal blocks are one kind: what is compiled for one serves
all. Every other room walks this description; none holds a list of matrices of its own.

The parameter tree is the GGUF namespace: the path to a tensor, joined by dots, is its name in a file, e.g.
`params["blk"][3]["attn_q"]["weight"]` is `blk.3.attn_q.weight`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from ramp_jax.models.spec import DecoderSpec

Params = Mapping[Any, Any]
"""A tree of parameters, or a part of one: a dictionary, or one of `store.py` that is read when it is asked for."""

Tap = Callable[[str, jax.Array], jax.Array]
"""Sees an activation under its name and passes it on."""

STREAM = "residual"
"""Name of the residual stream before a block, among its taps."""

HEAD_INPUT, LOOKED_UP = "head_in", "token"
"""What the head reads, and what stands for the input of an embedding that is not the head as well."""

SMALLEST_BLOCK = 32
"""Weights in the smallest block of ggml's formats: rows that are no multiple of it cannot be quantized."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of a sub-block, by its GGUF name inside the block (`attn_q.weight`).

    Of a matrix `[out, in]`, `reads` names the activation that it multiplies, `place` where it stands in the forward
    pass of a block (0 the first, 1 what comes after it), and `writes` whether its output goes to the residual stream.
    `rope_heads` is the number of heads of rows that rotary positions turn, whose order in a GGUF a family may permute.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["matrix", "gain", "bias", "other"]
    reads: str | None = None
    place: float = 0.0
    writes: bool = False
    rope_heads: int | None = None


@dataclasses.dataclass(frozen=True)
class Activation:
    """What matrices of a sub-block read, `[..., width]`.

    `maker` names the module whose rows (or gains) scale its channels one by one, None where there is none: dividing
    them divides the activation. They begin at row `first_row` of a module that makes other things as well.
    Where `repeats` of the activation's channel groups share one of the maker's (grouped-query attention), channels are
    `[groups, repeats, width / (groups · repeats)]` and the maker's rows lack the axis `repeats`.
    """

    name: str
    width: int
    maker: str | None = None
    groups: int = 1
    repeats: int = 1
    first_row: int = 0

    def by_group(self, values: Float[Array, " width"]) -> Float[Array, "groups repeats H"]:
        """Channels by the group that shares a row of the maker."""
        return values.reshape(self.groups, self.repeats, -1)

    def maker_rows(self, values: Float[Array, " width"]) -> Float[Array, " rows"]:
        """One value per row of the maker, from values that its repeats share."""
        return self.by_group(values)[:, 0].reshape(-1)

    def share(self, magnitude: Float[Array, " width"]) -> Float[Array, " width"]:
        """Root mean squares over the repeats that share a row of the maker, at each of them."""
        grouped = self.by_group(magnitude)
        mean = jnp.sqrt(jnp.mean(jnp.square(grouped), axis=1, keepdims=True))
        return jnp.broadcast_to(mean, grouped.shape).reshape(-1)


def pass_on(name: str, x: jax.Array) -> jax.Array:
    """The tap that looks at nothing."""
    del name
    return x


class SubBlock(abc.ABC):
    """A mixer or an MLP that adds to the residual stream; subclasses are frozen dataclasses.

    `name` begins the names of its tensors, `<name>_out` is the activation that it writes to the stream. `mixes` says
    whether tokens meet in it. `inner` is the width of its widest activation, `cache_channels` how many numbers per
    token it keeps for later ones, `window` how many tokens back it looks at most.
    """

    name: ClassVar[str]
    mixes: ClassVar[bool] = False
    window: int | None = None

    @property
    @abc.abstractmethod
    def weights(self) -> tuple[Weight, ...]:
        """Its tensors, in forward order."""

    @property
    @abc.abstractmethod
    def activations(self) -> tuple[Activation, ...]:
        """What its matrices read, in forward order."""

    @property
    @abc.abstractmethod
    def inner(self) -> int:
        """Width of its widest activation."""

    @property
    def cache_channels(self) -> int:
        """Numbers per token that later tokens need."""
        return 0

    @property
    def writes(self) -> str:
        """Name of the activation that it adds to the stream."""
        return f"{self.name}_out"

    @abc.abstractmethod
    def __call__(self, w: Params, x: Float[Array, "B T D"], tap: Tap = pass_on) -> Float[Array, "B T D"]:
        """The stream f32 after it; `w` is the block's part of the parameter tree. Taps see what it reads and writes."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One layer. Blocks that are equal are of one kind and share compiled programs."""

    sub_blocks: tuple[SubBlock, ...]

    @functools.cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All its tensors, in forward order."""
        return tuple(weight for sub in self.sub_blocks for weight in sub.weights)

    @functools.cached_property
    def activations(self) -> tuple[Activation, ...]:
        """What its matrices read, in forward order."""
        return tuple(activation for sub in self.sub_blocks for activation in sub.activations)

    @functools.cached_property
    def taps(self) -> tuple[str, ...]:
        """Everything that a tap sees, in forward order."""
        seen = ((*(a.name for a in sub.activations), sub.writes) for sub in self.sub_blocks)
        return (STREAM, *(name for names in seen for name in names))

    def readers(self, activation: str) -> tuple[Weight, ...]:
        """The matrices that multiply an activation, in forward order."""
        return tuple(weight for weight in self.weights if weight.reads == activation)

    def __call__(self, w: Params, x: Float[Array, "B T D"], tap: Tap = pass_on) -> Float[Array, "B T D"]:
        """The residual stream f32 after the block, whose tensors are `w`."""
        tap(STREAM, x)
        for sub in self.sub_blocks:
            x = sub(w, x, tap)
        return x


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: a weight and the block that it lies in, None outside the blocks.

    `written_as` names what its sub-block adds to the stream, None outside the blocks.
    """

    weight: Weight
    layer: int | None = None
    written_as: str | None = None

    @functools.cached_property
    def path(self) -> tuple[str | int, ...]:
        """Its path in the parameter tree."""
        inside = tuple(self.weight.name.split("."))
        return inside if self.layer is None else ("blk", self.layer, *inside)

    @functools.cached_property
    def name(self) -> str:
        """GGUF name, e.g. `blk.3.attn_q.weight`."""
        return ".".join(map(str, self.path))

    @property
    def shape(self) -> tuple[int, ...]:
        """`[out, in]` of a matrix."""
        return self.weight.shape

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies an activation (or is looked up), in the dtype of all matrix products."""
        return self.weight.kind == "matrix"

    @property
    def allocatable(self) -> bool:
        """Whether a level is chosen for it: it is a matrix whose rows blocks can hold."""
        return self.is_matrix and self.shape[-1] % SMALLEST_BLOCK == 0

    @property
    def reads(self) -> str | None:
        """Full name of the activation that it multiplies, e.g. `blk.3.attn_in`."""
        return None if self.weight.reads is None else full_name(self.layer, self.weight.reads)

    @property
    def written(self) -> str | None:
        """Full name of what its sub-block writes to the stream, e.g. `blk.3.attn_out`."""
        return None if self.written_as is None else full_name(self.layer, self.written_as)


def full_name(layer: int | None, name: str) -> str:
    """Name of an activation in the whole decoder."""
    return name if layer is None else f"blk.{layer}.{name}"


@functools.lru_cache(maxsize=64)
def tensors(spec: "DecoderSpec") -> tuple[Tensor, ...]:
    """Every tensor of the file in forward order. A tied embedding is read as the head, so its input is the head's."""
    vocabulary = (spec.vocab_size, spec.d_model)
    embedding = Weight("token_embd.weight", vocabulary, "matrix", HEAD_INPUT if spec.tied else LOOKED_UP, place=1.0)
    head = () if spec.tied else (Tensor(Weight("output.weight", vocabulary, "matrix", HEAD_INPUT, place=1.0)),)
    return (
        Tensor(embedding),
        *(
            Tensor(weight, layer, sub.writes)
            for layer, block in enumerate(spec.blocks)
            for sub in block.sub_blocks
            for weight in sub.weights
        ),
        Tensor(Weight("output_norm.weight", (spec.d_model,), "gain")),
        *head,
    )


@functools.lru_cache(maxsize=64)
def matrices(spec: "DecoderSpec") -> tuple[Tensor, ...]:
    """All matrices, in forward order."""
    return tuple(tensor for tensor in tensors(spec) if tensor.is_matrix)


@functools.lru_cache(maxsize=64)
def allocatable(spec: "DecoderSpec") -> tuple[Tensor, ...]:
    """The matrices that a level is chosen for, in forward order; raises `ValueError` where there is none."""
    members = tuple(tensor for tensor in matrices(spec) if tensor.allocatable)
    if not members:
        widths = ", ".join(map(str, sorted({tensor.shape[-1] for tensor in matrices(spec)})))
        raise ValueError(
            f"nothing of this model can be quantized: blocks hold rows of a multiple of {SMALLEST_BLOCK} weights, its "
            f"matrices have rows of {widths}; use another model."
        )
    return members


@functools.lru_cache(maxsize=64)
def foldable(spec: "DecoderSpec") -> Mapping[str, Activation]:
    """Activations that Scale Folding can divide, by their full names, in forward order."""
    return {
        full_name(layer, activation.name): activation
        for layer, block in enumerate(spec.blocks)
        for activation in block.activations
        if activation.maker is not None
    }


def lookup(params: Params, tensor: Tensor) -> jax.Array:
    """The tensor's values in a parameter tree."""
    return functools.reduce(lambda tree, key: tree[key], tensor.path, params)


def nest(values: Iterable[tuple[Tensor, Any]]) -> dict[Any, Any]:
    """A tree from values of tensors."""
    tree: dict[Any, Any] = {}
    for tensor, value in values:
        _put(tree, tensor.path, value)
    return tree


def replaced(params: Params, values: Iterable[tuple[Tensor, Any]]) -> Params:
    """The tree with other values for some tensors; it shares all others with `params`, which stays as it is."""
    return _merge(params, nest(values))


def replace_in_block(w: Params, values: Mapping[str, Any]) -> Params:
    """A block's part of the tree with other values for some of its weights, by their names inside the block."""
    changed: dict[Any, Any] = {}
    for name, value in values.items():
        _put(changed, tuple(name.split(".")), value)
    return _merge(w, changed)


def of_block(w: Params, name: str) -> jax.Array:
    """A weight of a block by its name inside it."""
    return functools.reduce(lambda tree, key: tree[key], name.split("."), w)


def _put(tree: dict[Any, Any], path: Sequence[str | int], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _merge(old: Any, new: Any) -> Any:
    if not isinstance(new, dict):
        return new
    return {**old, **{key: _merge(old.get(key, {}), value) for key, value in new.items()}}


class Run(NamedTuple):
    """Blocks `first` to `first + period · count`: a period of kinds that repeats `count` times."""

    first: int
    period: int
    count: int

    @property
    def firsts(self) -> range:
        """Indices of the blocks of the first period."""
        return range(self.first, self.first + self.period)


@functools.lru_cache(maxsize=64)
def runs(blocks: tuple[Block, ...]) -> tuple[Run, ...]:
    """Cut blocks into runs of equal periods, which a scan compiles once each: from the front, the longest, then the
    shortest period."""
    found, first = [], 0
    while first < len(blocks):
        candidates = [Run(first, period, _repeats(blocks, first, period)) for period in range(1, len(blocks) + 1)]
        repeating = [run for run in candidates if run.count > 1 or run.period == 1]
        found.append(max(repeating, key=lambda run: (run.period * run.count, -run.period)))
        first += found[-1].period * found[-1].count
    return tuple(found)


def _repeats(blocks: tuple[Block, ...], first: int, period: int) -> int:
    """How often the `period` blocks from `first` on follow each other."""
    end = first + period
    while end < len(blocks) and blocks[end] == blocks[end - period]:
        end += 1
    return (end - first) // period


def stack(trees: Sequence[Any]) -> Any:
    """Equal trees with a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


Entries = tuple[tuple[Any, ...], ...]
"""Per run and place in its period, what the blocks there have, with a first axis over the run's repetitions."""


def by_run(blocks: tuple[Block, ...], gather: Callable[[Sequence[int]], Any]) -> Entries:
    """`gather(indices)` of the blocks at every place of every run, whose leaves it stacks."""
    return tuple(
        tuple(gather(range(first, run.first + run.period * run.count, run.period)) for first in run.firsts)
        for run in runs(blocks)
    )


def scan_blocks(
    blocks: tuple[Block, ...],
    entries: Entries,
    x: Float[Array, "B T D"],
    weights: Callable[[Any], Params] = lambda entry: entry,
) -> Float[Array, "B T D"]:
    """The stream after all blocks, inside one compiled function: one scan per run of equal periods.

    `weights` makes a block's part of the parameter tree of its entry.
    """
    for run, entry in zip(runs(blocks), entries, strict=True):
        period = tuple(blocks[first] for first in run.firsts)

        def one_period(x: jax.Array, entry: tuple[Any, ...], period: tuple[Block, ...] = period) -> tuple[Any, None]:
            for block, part in zip(period, entry, strict=True):
                x = block(weights(part), x)
            return x, None

        x, _ = jax.lax.scan(one_period, x, entry)
    return x
