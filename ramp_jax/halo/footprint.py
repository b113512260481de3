"""What llama.cpp needs in memory to run a file: weights, KV cache, compute buffer and output buffer.

The cache and the output buffer follow from sizes. The compute buffer is what ggml's allocator makes of a batch of 512
tokens (`-ub`): it puts every activation into the smallest gap that holds it, so the buffer depends on the order in
which they come and go, and that order is followed here, sub-block by sub-block. Of layers with a window only what it
needs is kept (no `--swa-full`, which programs on top of the library may choose).

On CPUs the numbers are what llama.cpp reports on loading (`tests/test_footprint.py`). They count a mapped file whole;
what a CPU repacks of it for its own instructions comes on top, while the system can drop the pages repacked. On GPUs
nothing was measured: by the same rules all layers, the cache and the compute buffer lie there, an embedding that is not
the head as well stays with the program, as does the output buffer; drivers and scratch space of kernels are not
counted. Neither is the program itself.
"""

import bisect
import dataclasses
import math
from typing import Literal, NamedTuple

from ramp_jax.allocation import Allocation, Costs, tensor_bytes
from ramp_jax.formats import get_format
from ramp_jax.models import DecoderSpec, allocatable, matrices
from ramp_jax.models.layout import LOOKED_UP, SubBlock

_BATCH = 512
_STEP = 256  # llama.cpp rounds contexts and windows up to a multiple
_ALIGNMENT = 32
_F16, _F32, _I32, _I64 = 2, 4, 4, 8
_ROTATED = 64  # channels, at least, that are turned together before they are quantized

KV_TYPES = ("f16", "q8_0", "q4_0")
"""Types of keys and values, by llama.cpp's names for `--cache-type-k` and `--cache-type-v`."""

Device = Literal["cpu", "gpu"]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How llama.cpp is to run a file.

    `context` are the tokens of each of `parallel` sequences (its `-c` is all of them, `-np` their number). `keys` and
    `values` are of `KV_TYPES` (`-ctk`, `-ctv`), `flash_attention` is `-fa`, `device` says whether all layers lie on a
    GPU (`-ngl all`) or none. Raises `ValueError` where llama.cpp would refuse.
    """

    context: int
    parallel: int = 1
    keys: str = "f16"
    values: str = "f16"
    flash_attention: bool = True
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if wrong := {self.keys, self.values} - set(KV_TYPES):
            raise ValueError(f"llama.cpp's cache cannot be {min(wrong)} here; choose {', '.join(KV_TYPES)}.")
        if self.values != "f16" and not self.flash_attention:
            raise ValueError(
                f"llama.cpp keeps values in {self.values} with flash attention alone; turn it on or keep them in f16."
            )

    def of(self, context: int) -> "Runtime":
        """The same for another context."""
        return dataclasses.replace(self, context=context)

    @property
    def batch(self) -> int:
        """Tokens of the largest batch."""
        return min(self.context * self.parallel, _BATCH)

    @property
    def tokens(self) -> int:
        """Those for which llama.cpp makes room in it: as many of each sequence."""
        return -(-self.batch // self.parallel) * self.parallel


class Footprint(NamedTuple):
    """Bytes beside the weights: of the KV cache, the compute buffer and the output buffer."""

    cache: int
    compute: int
    output: int


def footprint(spec: DecoderSpec, runtime: Runtime) -> Footprint:
    """What a file of `spec` takes beside its weights.

    Raises `ValueError` for a context length that the model was not made for, and for a cache whose blocks do not divide
    its heads.
    """
    if not 0 < runtime.context <= spec.context_length:
        raise ValueError(
            f"a context length of {runtime.context:,} is not between 1 and the {spec.context_length:,} that the model "
            f"was made for; choose another."
        )
    for kind in (runtime.keys, runtime.values):
        if spec.head_size % (block := get_format(kind.upper()).block_size):
            raise ValueError(f"heads of {spec.head_size} are no multiple of the {block} numbers of {kind}; keep f16.")
    output = spec.vocab_size * runtime.parallel * _F32
    return Footprint(cache_bytes(spec, runtime), _Batch(spec, runtime).size(), output)


def runtime_bytes(spec: DecoderSpec, runtime: Runtime) -> int:
    """Bytes beside the weights where the model runs: on a GPU, the output buffer lies elsewhere. As `footprint`."""
    found = footprint(spec, runtime)
    return sum(found) - (found.output if runtime.device == "gpu" else 0)


def cache_bytes(spec: DecoderSpec, runtime: Runtime) -> int:
    """Bytes of the KV cache of all sequences."""
    channels = sum(_tokens_kept(spec, sub, runtime) * sub.cache_channels // 2 for sub in _sub_blocks(spec))
    rows = (get_format(kind.upper()).row_bytes(channels) for kind in (runtime.keys, runtime.values))
    return runtime.parallel * sum(rows)


def _sub_blocks(spec: DecoderSpec) -> list[SubBlock]:
    return [sub for block in spec.blocks for sub in block.sub_blocks]


def _tokens_kept(spec: DecoderSpec, sub: SubBlock, runtime: Runtime) -> int:
    """Tokens of a sequence whose keys and values llama.cpp keeps: with a window that it runs, it and a batch more."""
    whole = _rounded(runtime.context)
    window = _window(spec, sub)
    return whole if window is None else min(whole, _rounded(window + runtime.batch))


def _window(spec: DecoderSpec, sub: SubBlock) -> int | None:
    return sub.window if spec.family.windows_run else None


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP


class _Buffer:
    """ggml's allocator: a tensor goes into the smallest gap that holds it, else to the end; `size` is the most used."""

    def __init__(self) -> None:
        self.size, self._end = 0, 0
        self._gaps: list[tuple[int, int]] = []  # begin and end, in order
        self._held: dict[int, int] = {}

    def take(self, size: int) -> int:
        """Where a tensor of that many bytes begins."""
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        fitting = [(end - begin, -begin, i) for i, (begin, end) in enumerate(self._gaps) if end - begin >= size]
        if fitting:
            begin, end = self._gaps.pop(min(fitting)[2])
            if end - begin > size:
                bisect.insort(self._gaps, (begin + size, end))
        else:
            begin, self._end = self._end, self._end + size
            self.size = max(self.size, self._end)
        self._held[begin] = size
        return begin

    def give(self, *begins: int) -> None:
        """Take back what begins there."""
        for begin in begins:
            bisect.insort(self._gaps, (begin, begin + self._held.pop(begin)))
            joined: list[tuple[int, int]] = []
            for gap in self._gaps:
                if joined and joined[-1][1] == gap[0]:
                    gap = (joined.pop()[0], gap[1])
                joined.append(gap)
            if joined[-1][1] == self._end:
                self._end = joined.pop()[0]
            self._gaps = joined


class _Cache(NamedTuple):
    """Where lies what layers with one cache read: rotations, the rows of keys and values that are written, the mask."""

    rotations: list[int]
    keys: int
    values: int
    mask: int


class _Batch:
    """The activations of a batch, in the order in which llama.cpp computes them.

    Each lies in the buffer until it was read last. What is computed number by number takes the place of what it is
    computed from, but for norms of the stream, which is read again, and for positions told to heads.
    """

    def __init__(self, spec: DecoderSpec, runtime: Runtime) -> None:
        self.spec, self.runtime, self.buffer, self.tokens = spec, runtime, _Buffer(), runtime.tokens

    def size(self) -> int:
        """Bytes of the buffer after all of them."""
        sub_blocks, give, width = _sub_blocks(self.spec), self.buffer.give, self.spec.d_model
        last = {_window(self.spec, sub): index for index, sub in enumerate(sub_blocks) if sub.mixes}
        ids = self._rows(1, _I32)
        self._rows(width)  # for embeddings that a program brings itself, never given back
        positions = self._rows(1, _I32)
        caches = {window: self._cache(sub_blocks[index]) for window, index in last.items()}
        asked, x = self._rows(1, _I32), self._rows(width)
        give(ids)
        for index, sub in enumerate(sub_blocks):
            normed = [self._rows(width)] if sub.weights[0].kind == "gain" else []
            products, final = self._products(sub, normed), index == max(last.values())
            if final:
                give(positions)
            if sub.mixes:
                window = _window(self.spec, sub)
                mixed = self._attended(sub, products, caches[window], done=last[window] == index)
            else:
                mixed = self._rows(sub.inner)
                give(*products)
            y = self._rows(width)
            give(mixed)
            if final:  # later parts see the tokens whose logits are asked for, which are all
                self.tokens = self.runtime.batch
                y, x = self._moved(y, width), self._moved(x, width)
                give(asked)
            give(x)
            x = y
        self._rows(self.spec.vocab_size)
        return self.buffer.size

    def _rows(self, channels: int, size: int = _F32) -> int:
        return self.buffer.take(self.tokens * channels * size)

    def _moved(self, begin: int, channels: int) -> int:
        """A copy in place of the original."""
        copy = self._rows(channels)
        self.buffer.give(begin)
        return copy

    def _cache(self, sub: SubBlock) -> _Cache:
        flash = self.runtime.flash_attention
        rotations = [self.buffer.take(size * size * _F32) for size in self._rotated if size]
        keys, values = self._rows(1, _I64), self._rows(1 if flash else sub.cache_channels // 2, _I64)
        return _Cache(rotations, keys, values, self._rows(self._kept(sub), _F16 if flash else _F32))

    def _kept(self, sub: SubBlock) -> int:
        return _tokens_kept(self.spec, sub, self.runtime)

    @property
    def _rotated(self) -> tuple[int, int]:
        """Channels of keys and of values that llama.cpp rotates together before it quantizes them, 0 for none."""
        together = math.gcd(self.spec.head_size, 1 << 30)  # the largest power of two
        if together < _ROTATED:
            return 0, 0
        return together if self.runtime.keys != "f16" else 0, _ROTATED if self.runtime.values != "f16" else 0

    def _products(self, sub: SubBlock, normed: list[int]) -> list[int]:
        """What the matrices make that read the stream or, of an attention, queries, keys and values of it."""
        matrices = [weight for weight in sub.weights if weight.kind == "matrix" and not weight.writes]
        if not sub.mixes or len(matrices) == 1:
            found = [self._rows(weight.shape[0]) for weight in matrices]
            self.buffer.give(*normed)
            return self._split(sub, *found) if sub.mixes else found
        windows = any(_window(self.spec, sub) for sub in _sub_blocks(self.spec))
        found, order = [0, 0, 0], (0, 1, 2) if windows else (0, 2, 1)
        for place in order:
            channels = matrices[place].shape[0]
            found[place] = self._rows(channels)
            if place == order[-1]:
                self.buffer.give(*normed)
            told = matrices[place].rope_heads is not None
            if told:
                found[place] = self._moved(found[place], channels)
            if self._rotated[0 if told else 1]:
                found[place] = self._moved(found[place], channels)
        return found

    def _split(self, sub: SubBlock, together: int) -> list[int]:
        """Queries, keys and values that one matrix made: values stay where they are unless they are rotated."""
        keys_rotated, values_rotated = self._rotated
        half = sub.cache_channels // 2
        q = self._rows(sub.inner)
        q = self._moved(q, sub.inner) if keys_rotated else q
        v = self._rows(half) if values_rotated else together
        k = self._rows(half)
        if values_rotated:
            self.buffer.give(together)
        return [q, self._moved(k, half) if keys_rotated else k, v]

    def _attended(self, sub: SubBlock, products: list[int], cache: _Cache, *, done: bool) -> int:
        """What attention makes of queries, after keys and values are in the cache; `done`: nobody reads that later."""
        q, k, v = products
        give, moved, flash = self.buffer.give, self._moved, self.runtime.flash_attention
        give(k, *[cache.keys] * done)
        give(v, *[cache.values] * done)
        mixed = self._rows(sub.inner if flash else self.spec.n_heads * self._kept(sub))
        give(q, *[cache.mask] * done)
        if not flash:
            mixed = moved(moved(mixed, sub.inner), sub.inner)  # scores with values, heads of a token side by side
        if self._rotated[1]:
            mixed = moved(mixed, sub.inner)
        give(*cache.rotations * done)
        return mixed


def weight_bytes(allocation: Allocation, device: Device) -> int:
    """Bytes of a file that lie on the device: on a GPU all but an embedding that is not the head as well."""
    beside = [tensor for tensor in matrices(allocation.spec) if device == "gpu" and tensor.reads == LOOKED_UP]
    return allocation.file_bytes - sum(tensor_bytes(tensor, allocation.format_of(tensor)) for tensor in beside)


def bytes_that_fit(spec: DecoderSpec, table: Costs, memory: int, runtime: Runtime) -> int:
    """Bytes of the largest file that `memory` bytes hold beside what it takes to run, at most the largest of `table`.

    On a GPU that is the GPU's memory, to which an embedding that is not the head as well does not go: the bytes of its
    smallest level come on top. Raises `ValueError` where the memory does not hold the smallest file.
    """
    beside, elsewhere = runtime_bytes(spec, runtime), _smallest_embedding(spec, table, runtime.device)
    if memory - beside + elsewhere < table.smallest:
        raise ValueError(
            f"{memory:,} bytes of memory cannot hold the smallest file, of which {table.smallest - elsewhere:,} bytes "
            f"lie there, and {beside:,} more for {runtime.parallel} x {runtime.context:,} tokens of context; choose "
            f"more memory or a shorter context."
        )
    return min(memory - beside + elsewhere, table.largest)


def _smallest_embedding(spec: DecoderSpec, table: Costs, device: Device) -> int:
    """Bytes that an embedding takes at least which does not lie on the device."""
    rows = zip(allocatable(spec), table.per_level, strict=True)
    return sum(int(row[row > 0].min()) for t, row in rows if device == "gpu" and t.reads == LOOKED_UP)
