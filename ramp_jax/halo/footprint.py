"""What llama.cpp needs in memory beside the weights: the KV cache and the compute buffer, as its programs run a file.

That is one sequence, keys and values in f16, flash attention, prompts in batches of 512 tokens (`-ub`), and of layers
with a window only what it needs (no `--swa-full`, which programs on top of the library may choose). Without flash
attention the compute buffer grows with heads times context. The program itself is not counted.
"""

from ramp_jax.allocation import Costs
from ramp_jax.models import DecoderSpec
from ramp_jax.models.layout import SubBlock

_BATCH = 512
_CONTEXT_STEP = 256  # llama.cpp rounds contexts and windows up to a multiple
_F16, _F32 = 2, 4


def runtime_bytes(spec: DecoderSpec, context: int) -> int:
    """Bytes of the KV cache of `context` tokens, exactly, and of the compute buffer, from above.

    The buffer holds what is alive at once in a batch: the logits or three activations of an MLP, whichever are wider,
    with five of attention and the stream, and a mask for each width of window. Raises `ValueError` for a context length
    that the model was not made for.
    """
    if not 0 < context <= spec.context_length:
        raise ValueError(
            f"a context length of {context:,} is not between 1 and the {spec.context_length:,} that the model was made "
            f"for; choose another."
        )
    batch, parts = min(context, _BATCH), _sub_blocks(spec)
    masks = {sub.window: _tokens_kept(spec, sub, context) for sub in parts if sub.mixes}
    mixers, mlps = ([sub.inner for sub in parts if sub.mixes == mixes] for mixes in (True, False))
    alive = max(spec.vocab_size, 3 * max(mlps, default=0)) + 5 * max(spec.d_model, *mixers)
    return cache_bytes(spec, context) + batch * (alive * _F32 + sum(masks.values()) * _F16) + spec.vocab_size * _F32


def cache_bytes(spec: DecoderSpec, context: int) -> int:
    """Bytes of the KV cache of `context` tokens, exactly."""
    return sum(_tokens_kept(spec, sub, context) * sub.cache_channels for sub in _sub_blocks(spec)) * _F16


def _sub_blocks(spec: DecoderSpec) -> list[SubBlock]:
    return [sub for block in spec.blocks for sub in block.sub_blocks]


def _tokens_kept(spec: DecoderSpec, sub: SubBlock, context: int) -> int:
    """Tokens whose keys and values llama.cpp keeps: with a window that it runs, those in it and a batch more."""
    whole = _rounded(context)
    if sub.window is None or not spec.family.windows_run:
        return whole
    return min(whole, _rounded(sub.window + min(context, _BATCH)))


def _rounded(tokens: int) -> int:
    return -(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP


def bytes_that_fit(spec: DecoderSpec, table: Costs, memory: int, context: int) -> int:
    """Bytes of the largest file that `memory` bytes hold beside what a context needs, at most the largest of `table`.

    Raises `ValueError` where they do not hold the smallest.
    """
    beside = runtime_bytes(spec, context)
    if memory - beside < table.smallest:
        raise ValueError(
            f"{memory:,} bytes of memory cannot hold the smallest file, {table.smallest:,} bytes, and {beside:,} more "
            f"for {context:,} tokens of context; choose more memory or a shorter context."
        )
    return min(memory - beside, table.largest)
