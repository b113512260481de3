"""What llama.cpp needs in memory beside the weights: the KV cache and the compute buffer, as it runs a file by default.

That is one sequence, keys and values in f16, flash attention, and prompts in batches of 512 tokens (`-ub`). Without
flash attention the compute buffer grows with heads times context. The program itself is not counted.
"""

from ramp_jax.allocation import Costs
from ramp_jax.models import DecoderSpec

_BATCH = 512
_CONTEXT_STEP = 256  # llama.cpp rounds contexts up to a multiple
_F16, _F32 = 2, 4


def runtime_bytes(spec: DecoderSpec, context: int) -> int:
    """Bytes of the KV cache of `context` tokens, exactly, and of the compute buffer, from above.

    The buffer holds what is alive at once in a batch: the logits or three activations of an MLP, whichever are wider,
    with five of attention and the stream, and the mask. Raises `ValueError` for a context length that the model was not
    made for.
    """
    if not 0 < context <= spec.context_length:
        raise ValueError(
            f"a context length of {context:,} is not between 1 and the {spec.context_length:,} that the model was made "
            f"for; choose another."
        )
    batch, context = min(context, _BATCH), -(-context // _CONTEXT_STEP) * _CONTEXT_STEP
    parts = [sub for block in spec.blocks for sub in block.sub_blocks]
    per_token = sum(sub.cache_channels for sub in parts) * _F16
    mixers, mlps = ([sub.inner for sub in parts if sub.mixes == mixes] for mixes in (True, False))
    alive = max(spec.vocab_size, 3 * max(mlps, default=0)) + 5 * max(spec.d_model, *mixers)
    return context * per_token + batch * (alive * _F32 + context * _F16) + spec.vocab_size * _F32


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
