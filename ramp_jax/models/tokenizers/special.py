"""Which tokens begin and end texts, and which end what a model writes, as GGUF pairs."""

from pathlib import Path
from typing import Any

from gguf import Keys
from transformers import PreTrainedTokenizerBase

from ramp_jax.models.tokenizers.vocabulary import ROLES, WAY_OUT

_MESSAGE_ENDS = "<|eom_id|>"


def ends(configs: list[dict[str, Any]]) -> list[int]:
    """The ids `eos_token_id` of the configs, each of which is one id or a list of some."""
    values = [config.get("eos_token_id") for config in configs]
    ids = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]


def special_pairs(tokenizer: PreTrainedTokenizerBase, ended_by: list[int], folder: Path) -> dict[str, Any]:
    """Ids of special tokens, whether texts begin with BOS and end with EOS, and what else ends an answer.

    llama.cpp's converter is followed where the tokenizer's rule and its special tokens disagree: what the rule puts
    around texts is BOS and EOS, and the EOS that is named ends a turn. Of the ids `ended_by` that end an answer, the
    first that is not EOS ends a turn and the next a message. Raises `ValueError` where more stands around texts.
    """
    named = {role: getattr(tokenizer, role) for role in ROLES}
    ids = {role: tokenizer.convert_tokens_to_ids(token) for role, token in named.items() if token is not None}
    alone, around = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before, after = _around(alone, around)
    if len(before) > 1 or len(after) > 1:
        raise ValueError(
            f"{folder}: its tokenizer cannot be written to GGUF, since it puts more around texts than one token at "
            f"each end; {WAY_OUT}"
        )
    others = [ids["eos_token"]] if after and ids.get("eos_token", after[0]) != after[0] else []
    ids |= dict(zip(("bos_token",), before, strict=False)) | dict(zip(("eos_token",), after, strict=False))
    others += [i for i in ended_by if 0 <= i < len(tokenizer)]
    others = [i for i in dict.fromkeys(others) if i != ids.get("eos_token")]
    others.sort(key=lambda i: tokenizer.convert_ids_to_tokens(i) == _MESSAGE_ENDS)
    more = dict(zip((Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID), others, strict=False))
    return (
        {key: ids[role] for role, key in ROLES.items() if role in ids}
        | more
        | {Keys.Tokenizer.ADD_BOS: bool(before), Keys.Tokenizer.ADD_EOS: bool(after)}
    )


def _around(alone: list[int], around: list[int]) -> tuple[list[int], list[int]]:
    """What stands before and behind the tokens of a text."""
    count = len(around) - len(alone)
    start = next((i for i in range(count + 1) if around[i : i + len(alone)] == alone), 0)
    return around[:start], around[start + len(alone) :]
