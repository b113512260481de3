"""Flags that decide about single tensors before anybody chooses."""

from typing import get_args

from absl import flags

from ramp_jax.overrides import Kind, Override, parse_override

OVERRIDE_FLAGS = get_args(Kind)
_HELP = {
    "keep": "Give all matrices whose GGUF name matches exactly this format, as in blk.*.attn_v.weight=Q6_K",
    "floor": "Give them no fewer bits per weight than this format has, which is one of what they are chosen among",
    "ceiling": "Give them no more bits per weight than this format has, likewise",
}


def define_overrides() -> None:
    """`--keep`, `--floor` and `--ceiling`, each as often as needed."""
    for kind, text in _HELP.items():
        flags.DEFINE_multi_string(kind, [], f"{text}: PATTERN=FORMAT with *, ? and [...] as in file names. Repeatable.")


def overrides() -> tuple[Override, ...]:
    """What the flags decide; raises `ValueError` for what is no PATTERN=FORMAT."""
    return tuple(parse_override(kind, text) for kind in OVERRIDE_FLAGS for text in flags.FLAGS[kind].value)
