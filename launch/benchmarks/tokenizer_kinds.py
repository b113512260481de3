"""Small tokenizers of every kind that people's models have, trained on the standard library's language topics.

Each is written as its models' Hugging Face directories hold it. The expressions are those of the published
`tokenizer.json` files, written as there, and not those of `ramp_jax`, which are to be compared with them.
"""

import dataclasses
import functools
import io
import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ramp_jax import data

VOCABULARY = 900
_TRAINED_ON = 120_000  # characters
_LONGEST_RUN = 12  # spaces in one token of the Gemma kind

Build = Callable[[Path], None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of tokenizer: what writes its directory, the name llama.cpp should find, tokens to put into texts.

    `apart` says of a line whether llama.cpp may give other ids than Hugging Face in principle, and `reason` why;
    `name` is the model's, by which llama.cpp tells Phi-3. `ours_too`: our reading differs on these lines as well.
    """

    build: Build
    pre: str
    specials: tuple[str, ...]
    apart: Callable[[str], bool] = lambda line: False
    reason: str = ""
    name: str = "model"
    ours_too: bool = False


_SCRIPTS = (
    "naïve Café ÉCOLE Ångström ΑΒΓ αβγ Ωmega Привет МИР Ёлка 你好世界 日本語テスト 한국어 مرحبا שלום สวัสดี हिन्दी বাংলা "
    "e\u0301 n\u0303o \u01c5ungla ªº ﬁn ＡＢＣ ½ ² Ⅷ ٣٤٥ ß ẞ İi ʰa ꙮ 𝔘𝔫𝔦 𐍈"
)
_WORDS = "don't I'LL We'Ve 'RE he's' iPhone HTMLParser __init__ ABCabcDEF a'b ▁x ..."


def lines(specials: Sequence[str], count: int = 2000, seed: int = 1) -> list[str]:
    """Lines of prose, code, many scripts, emoji, digits, runs of white space, and special tokens among all of it."""
    rng = random.Random(seed)
    topics = [line for line in data.read_text("builtin").splitlines() if line.strip()]
    emoji = ["🙂", "🚀", "👩‍👩‍👧‍👦", "✅", "🦙🦙", "❤️", "🇩🇪", "🏳️‍🌈", "😶\u200d🌫️"]
    code = [
        "def f(x):",
        "\treturn x**2",
        "x=[1,2];",
        "if(a&&b){",
        "}//end",
        "    print(f'{a!r}')",
        "<div/>",
        "a->b::c",
        "$_",
    ]
    digits = ["3", "33", "12345", "1234567", "3.14", "1e-9", "0xFF", "1,000,000", "2024-01-02", "v1.2.3"]
    spaces = [" ", "  ", "   ", "\t", "\t\t", " \t ", "    ", "          ", "\xa0", "\u3000", "\r", "\x0b"]
    words, scripts = _WORDS.split(), _SCRIPTS.split()

    def piece() -> str:
        kind = rng.choice([scripts, emoji, code, digits, words, specials or words, ["\n", "\n\n", "\r\n", "/\n"]])
        return rng.choice(kind)

    def mixed() -> str:
        return "".join(piece() + rng.choice(["", " ", " ", rng.choice(spaces)]) for _ in range(rng.randint(1, 12)))

    return [rng.choice(topics) if rng.random() < 0.25 else mixed() for _ in range(count)]


@functools.cache
def _text() -> str:
    return data.read_text("builtin")[:_TRAINED_ON] + "\n".join(lines((), seed=0))


def _save(backend: Tokenizer, folder: Path, **config: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


# Byte-level BPE


def _byte_level(
    cut: Sequence[pre_tokenizers.PreTokenizer],
    special: Sequence[str],
    *,
    defined: Sequence[str] = (),
    nfc: bool = False,
    ignore_merges: bool = False,
    bos: bool = False,
    **config: object,
) -> Build:
    """Writer of a tokenizer with these cuts, whose first special token is BOS and second EOS."""

    def build(folder: Path) -> None:
        backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        backend.normalizer = normalizers.NFC() if nfc else None
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(cut)) if len(cut) > 1 else cut[0]
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY - 40,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([_text()], trainer)
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        backend.add_tokens([AddedToken(token, normalized=False) for token in defined])
        if bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{special[0]} $A", special_tokens=[(special[0], backend.token_to_id(special[0]))]
            )
        else:
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        _save(backend, folder, bos_token=special[0], eos_token=special[1], **config)

    return build


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)


_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _case_or_accent(line: str) -> bool:
    return any(ord(c) > 127 and unicodedata.category(c) in ("Lu", "Ll", "Lt", "Mn", "Mc", "Me") for c in line)


def _not_composed(line: str) -> bool:
    return not unicodedata.is_normalized("NFC", line)


_CASE = "llama.cpp's std::regex knows no case outside ASCII and takes accents for symbols"
_NFC = "llama.cpp does not compose characters (NFC)"


# SentencePiece


@functools.cache
def _pieces(prefix: bool, defined: tuple[str, ...] = ()) -> bytes:
    """A trained `tokenizer.model`: BPE with byte fallback, split digits, text left as it is."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_text().splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY - 40,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefix,
        user_defined_symbols=list(defined),
        character_coverage=1.0,
        minloglevel=2,
    )
    return written.getvalue()


def _from_pieces(content: bytes) -> Tokenizer:
    """The model as transformers converts it: every way to make a token of two others, the best score first."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    plain = {
        token: i for token, i in vocabulary.items() if not (processor.is_control(i) or processor.is_byte(i) or i == 0)
    }
    merges = [
        (token[:cut], token[cut:])
        for token, i in sorted(plain.items(), key=lambda item: (-processor.get_score(item[1]), item[1]))
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    return backend


def _sentencepiece(
    scheme: str,
    *,
    special: Sequence[str] = (),
    defined: Sequence[str] = (),
    pieces: tuple[str, ...] = (),
    rstrip: Sequence[str] = (),
    model_file: bool = False,
) -> Build:
    """Writer of a tokenizer that puts the space in front as `scheme` has it: legacy, first or never."""

    def build(folder: Path) -> None:
        content = _pieces(scheme != "never", pieces)
        backend = _from_pieces(content)
        known = [token for token in ("<unk>", "<s>", "</s>") if token not in special]
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in known])
        backend.add_special_tokens([AddedToken(token, normalized=False, rstrip=token in rstrip) for token in special])
        backend.add_tokens([AddedToken(token, normalized=False) for token in (*pieces, *defined)])
        escape = normalizers.Replace(" ", "▁")
        if scheme == "legacy":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape])
        elif scheme == "first":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        else:
            backend.normalizer = escape
            backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
        _save(backend, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        if model_file:
            (folder / "tokenizer.model").write_bytes(content)

    return build


def _model_alone(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_pieces(True))


_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
_CHAT = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
_MISTRAL = ("[INST]", "[/INST]", "[TOOL_CALLS]")
_RUNS = tuple("▁" * n for n in range(2, _LONGEST_RUN + 1))
_PHI = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")


def _special_or_first_space(line: str) -> bool:
    return line.startswith((" ", "▁")) or any(token in line for token in ("<s>", "</s>", *_MISTRAL))


KINDS = {
    "Llama-3": Kind(
        _byte_level([_split(_CL100K), _BYTES], _LLAMA3, ignore_merges=True, bos=True), "llama-bpe", _LLAMA3
    ),
    "Qwen2": Kind(
        _byte_level([_split(_QWEN), _BYTES], _CHAT, defined=("<tool_call>", "</tool_call>"), nfc=True),
        "qwen2",
        (*_CHAT, "<tool_call>", "</tool_call>"),
        _not_composed,
        _NFC,
    ),
    "Mistral tekken": Kind(
        _byte_level([_split(_TEKKEN), _BYTES], ("<s>", "</s>", *_MISTRAL), ignore_merges=True, bos=True),
        "tekken",
        ("<s>", "</s>", *_MISTRAL),
        _case_or_accent,
        _CASE,
    ),
    "SmolLM": Kind(_byte_level([_DIGITS, _GPT2], _CHAT), "smollm", _CHAT),
    "Phi-4-mini, o200k": Kind(
        _byte_level([_split(_O200K), _BYTES], _PHI[::-1]), "gpt-4o", _PHI, _case_or_accent, _CASE
    ),
    "GPT-2": Kind(_byte_level([_GPT2], ("<|endoftext|>",) * 2), "gpt-2", ("<|endoftext|>",)),
    "OLMo": Kind(
        _byte_level([_GPT2], ("<|endoftext|>", "<|padding|>"), defined=("    ", "  "), nfc=True),
        "olmo",
        ("<|endoftext|>", "<|padding|>"),
        _not_composed,
        _NFC,
    ),
    "OLMo-2, Phi-4": Kind(_byte_level([_split(_CL100K, "removed", invert=True), _BYTES], _CHAT), "llama-bpe", _CHAT),
    "Granite": Kind(_byte_level([_DIGITS, _GPT2], _CHAT, clean_up_tokenization_spaces=True), "refact", _CHAT),
    "Llama-2": Kind(_sentencepiece("legacy", model_file=True), "default", ("<s>", "</s>", "<unk>")),
    "Llama-2, no scores": Kind(_sentencepiece("legacy", defined=("<new>",)), "default", ("<s>", "</s>", "<new>")),
    "Llama-2, tokenizer.model": Kind(_model_alone, "default", ()),
    "Mistral": Kind(
        _sentencepiece("first", special=_MISTRAL, model_file=True),
        "default",
        ("<s>", "</s>", *_MISTRAL),
        _special_or_first_space,
        "llama.cpp puts a space in front of every text, behind special tokens too",
    ),
    "Gemma": Kind(
        _sentencepiece(
            "never", special=("<start_of_turn>", "<end_of_turn>", "<unused0>"), pieces=_RUNS, model_file=True
        ),
        "default",
        ("<start_of_turn>", "<end_of_turn>", "<unused0>", " " * (_LONGEST_RUN - 1)),
        lambda line: "▁▁" in line.replace(" ", "▁") and ("▁" in line or "▁" * _LONGEST_RUN in line.replace(" ", "▁")),
        "llama.cpp takes runs of spaces out of the text first, the longest as often as it fits",
    ),
    "Phi-3": Kind(
        _sentencepiece("legacy", special=("</s>", *_PHI), rstrip=("</s>", *_PHI[:3]), model_file=True),
        "default",
        ("<s>", "</s>", *_PHI),
        lambda line: any(c in line for c in "\xa0\u3000"),
        "llama.cpp takes only ASCII white space away behind special tokens",
        name="Phi-3-mini",
        ours_too=True,
    ),
}
"""By the models that have them."""
