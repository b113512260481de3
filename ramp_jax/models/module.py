"""The decoder as a Flax module, for whoever wants to train it, quantize it with other tools, or save it with Orbax."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from ramp_jax.models.decoder import output_head, scanned_hidden_states
from ramp_jax.models.layout import Params
from ramp_jax.models.spec import DecoderSpec


class Part(nnx.Module):
    """A node of the parameter tree; what is called `blk.3.attn_q.weight` in a GGUF is `blk[3].attn_q.weight` here."""

    def __init__(self, tree: Params) -> None:
        for name, value in tree.items():
            setattr(self, name, Part(value) if isinstance(value, dict) else nnx.Param(value))


class DecoderModule(nnx.Module):
    """A decoder that holds its parameters: `nnx.to_pure_dict(nnx.split(module)[1])` is the tree of `Model.params`."""

    def __init__(self, spec: DecoderSpec, params: Params) -> None:
        self.spec = spec
        self.blk = nnx.List([Part(params["blk"][index]) for index in range(len(spec.blocks))])
        for name, tree in params.items():
            if name != "blk":
                setattr(self, name, Part(tree))

    @property
    def params(self) -> dict[str, Any]:
        """The tree of its parameters as they are now."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits f32 of every position; equal blocks are scanned, so that a training step compiles each kind once."""
        params = self.params
        return output_head(self.spec, params)(scanned_hidden_states(self.spec, params, ids))
