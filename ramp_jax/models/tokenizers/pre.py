"""How byte-level BPE cuts a text into words: llama.cpp's names for it, in both directions.

GGUF names a pre-tokenizer (`tokenizer.ggml.pre`) instead of storing it. A name stands for regular expressions, applied
one after the other inside what the one before has cut, and for a few habits of the model behind them.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer


@dataclasses.dataclass(frozen=True)
class Pre:
    """What llama.cpp does under one name.

    `splits` cut as llama.cpp does. `published` are the tokenizers' own expressions where these differ: llama.cpp knows
    no case outside ASCII and takes accents apart from their letters. `nfc` says that the published tokenizers compose
    characters first, which llama.cpp leaves to whoever writes the text. `ignore_merges` takes words of the vocabulary
    whole; `add_bos` is what holds where a file does not say it.
    """

    splits: tuple[str, ...]
    published: tuple[str, ...] = ()
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_ACCENTED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_QWEN35 = rf"{_ENDINGS}|{_ACCENTED}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(upper: str, lower: str, ending: str, digits: str) -> str:
    """Words that end where a lower-case letter is followed by an upper-case one, as in o200k and tekken."""
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_ASCII_CASE = (r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]")
_CASE = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
_THREE = r"\p{N}{1,3}"

PRE_TOKENIZERS = {
    "gpt-2": Pre((_GPT2,)),
    "olmo": Pre((_GPT2,), nfc=True),
    "smollm": Pre((r"\p{N}", _GPT2)),
    "refact": Pre((r"\p{N}", _GPT2)),
    "command-r": Pre((r"\p{N}", _GPT2), nfc=True),
    "llama-bpe": Pre((_CL100K,), ignore_merges=True, add_bos=True),
    "dbrx": Pre((_CL100K,)),
    "glm4": Pre((_CL100K,), ignore_merges=True),
    "qwen2": Pre((_QWEN2,), nfc=True),
    "qwen35": Pre((_QWEN35,), nfc=True),
    "tekken": Pre(
        (_cased(*_ASCII_CASE, "", r"\p{N}"),),
        (_cased(*_CASE, "", r"\p{N}"),),
        ignore_merges=True,
        add_bos=True,
    ),
    "gpt-4o": Pre((_cased(*_ASCII_CASE, f"{_ENDINGS}?", _THREE),), (_cased(*_CASE, f"{_ENDINGS}?", _THREE),)),
    "seed-coder": Pre((rf"{_ENDINGS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""By llama.cpp's name; of names that stand for the same, the first is the one to write."""

_ALIASES = {
    "gpt-2": "phi-2 jina-es jina-de gigachat a.x-4.0 mellum modern-bert mpt jais trillion granite-docling exaone4",
    "refact": "starcoder codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    "dbrx": "smaug-bpe chatglm-bpe",
    "glm4": "glm5",
    "qwen2": "stablelm2 hunyuan solar-open megrez deepseek-r1-qwen kormo f2llmv2 grok-2",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
}
_CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()}


def get(name: str) -> Pre | None:
    """What llama.cpp does under a name or one of its other names; None where it is not known here."""
    return PRE_TOKENIZERS.get(_CANONICAL.get(name, name))


def pre_tokenizer(splits: tuple[str, ...]) -> PreTokenizer:
    """The expressions in turn, then bytes as GPT-2's letters."""
    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def find(
    found: PreTokenizer,
    patterns: Sequence[str],
    nfc: bool,
    ignore_merges: bool,
    merges_matter: Callable[[], bool],
    cleans: bool,
) -> str | None:
    """llama.cpp's name for a pre-tokenizer, by how it cuts and not by how it is written; None where there is none.

    `patterns` are what it looks for, since a word that only one of them knows stands in them. `nfc`: text is composed
    first. `merges_matter` says, where a name would take words whole and the tokenizer does not
    or the other way round, whether this changes any token. `cleans`: spaces before punctuation are taken out of decoded
    text, which tells names that cut alike.
    """
    cuts, words = _cuts(found, _probe()), "a" + " a".join(f"{pattern} {pattern}a" for pattern in patterns)
    alike = [
        name
        for name, pre in PRE_TOKENIZERS.items()
        if (pre.nfc or not nfc)
        and cuts in _known_cuts(pre, _probe())
        and _cuts(found, words) in _known_cuts(pre, words)
    ]
    alike.sort(key=lambda name: (PRE_TOKENIZERS[name].nfc != nfc, (name == "smollm") == cleans))
    if alike and PRE_TOKENIZERS[alike[0]].ignore_merges != ignore_merges and merges_matter():
        alike = [name for name in alike if PRE_TOKENIZERS[name].ignore_merges == ignore_merges]
    return alike[0] if alike else None


@functools.lru_cache(256)
def _known_cuts(pre: Pre, text: str) -> list[list[str]]:
    return [_cuts(pre_tokenizer(splits), text) for splits in (pre.splits, pre.published) if splits]


def _cuts(found: PreTokenizer, text: str) -> list[str]:
    return [word for word, _ in found.pre_tokenize_str(text)]


@functools.cache
def _probe() -> str:
    """Text in which everything that the expressions speak of stands beside everything else.

    Left out is what only letters of one language tell apart: U+017F, which `(?i:'s)` takes for an s.
    """
    letters = [*"abzABZsStTdDmM", *"éÉßǅʰªא字ก한нЖ", "\u0301", "\u093e", "ll", "LL", "Re", "vE", "'ve", "'S", "'"]
    digits = [*"0123456789", "٣", "²", "½", "Ⅷ", "1234567", "12345"]
    symbols = [*'.,!?-_/\\()[]{}<>=+$^`|~#@&%*";:', "€", "…", "「", "«", "🙂", "\u200d", "\ufe0f", "\x00", "\x1c"]
    spaces = [
        " ",
        " ",
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        "\x0b",
        "\x85",
        "\xa0",
        "\u3000",
        "\u2028",
    ]
    rng = random.Random(0)
    kinds = rng.choices([letters, digits, symbols, spaces], weights=[4, 2, 3, 3], k=12_000)
    return "a" + "".join(rng.choice(kind) for kind in kinds)
