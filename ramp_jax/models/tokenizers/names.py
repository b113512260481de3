"""What llama.cpp takes from a model's name: behind special tokens of a Phi-3 it strips white space.

It goes by `phi-3` or `phi3` in `general.name`, whatever the case, and does not load a file of such a name whose
vocabulary lacks one of four tokens.
"""

import re
from collections.abc import Collection, Iterable

from gguf import Keys
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from ramp_jax.models.metadata import Metadata

_PHI_3 = re.compile("(phi)-?(3)", re.IGNORECASE | re.ASCII)
_PHI_3_APART = re.compile(r"\b(phi) (3)\b", re.IGNORECASE | re.ASCII)  # as titles are written
_KEPT = ("<unk>", "<s>", "<|endoftext|>")  # behind which nothing is stripped
_LOOKED_UP = (*_KEPT, "</s>")

STRIPPING_NAME = "Phi-3"


def stripping(tokens: Collection[str], name: str) -> frozenset[str]:
    """The `tokens` of a model of this name behind which llama.cpp strips white space, if they are special ones."""
    applies = _PHI_3.search(name) is not None and set(tokens).issuperset(_LOOKED_UP)
    return frozenset(tokens).difference(_KEPT) if applies else frozenset()


def strips(added: Iterable[AddedToken]) -> bool:
    """Whether these special and added tokens strip white space behind them as Phi-3's do: most of them."""
    flags = [token.rstrip for token in added if token.content not in _KEPT]
    return 2 * sum(flags) > len(flags)


def name_for_llama_cpp(name: str, tokenizer: PreTrainedTokenizerBase | None, pairs: Metadata) -> str:
    """The model's name, changed where llama.cpp would not load it, or strip other white space than the tokenizer.

    `pairs` are the vocabulary's; a name without one stays as it is.
    """
    if tokenizer is None:
        return name
    stripped = stripping(pairs[Keys.Tokenizer.LIST].value, STRIPPING_NAME)
    if stripped and strips(tokenizer.backend_tokenizer.get_added_tokens_decoder().values()):
        joined = _PHI_3_APART.sub(r"\1-\2", name)
        return joined if _PHI_3.search(joined) else f"{STRIPPING_NAME} {name}"
    return _PHI_3.sub(r"\1 \2", name)
