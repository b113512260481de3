"""What llama.cpp needs in memory beside the weights, as it runs a file by default.

That is one sequence, keys and values in f16, flash attention, and prompts in batches of 512 tokens. The program itself
is not counted.
"""

from ramp_jax.models import DecoderSpec

_BATCH = 512
_CONTEXT_STEP = 256  # llama.cpp rounds contexts up to a multiple
_F16, _F32 = 2, 4


def runtime_bytes(spec: DecoderSpec, context: int) -> int:
    """Bytes of the keys and values of `context` tokens, exactly, and of llama.cpp's buffers, from above.

    Buffers hold what is alive at once in a batch: the logits or three activations of an MLP, whichever are wider, with
    five of attention and the stream, and which tokens see which. Raises `ValueError` for a context that the model was
    not made for.
    """
    if not 0 < context <= spec.context_length:
        raise ValueError(
            f"a context of {context:,} tokens is not between 1 and the {spec.context_length:,} that the model was "
            f"made for; choose another --fit_context."
        )
    batch, context = min(context, _BATCH), -(-context // _CONTEXT_STEP) * _CONTEXT_STEP
    per_token = 2 * spec.n_layers * spec.n_kv_heads * spec.head_size * _F16
    alive = max(spec.vocab_size, 3 * spec.d_ff) + 5 * max(spec.d_model, spec.n_heads * spec.head_size)
    return context * per_token + batch * (alive * _F32 + context * _F16) + spec.vocab_size * _F32
