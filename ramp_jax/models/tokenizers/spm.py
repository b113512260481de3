"""SentencePiece as llama.cpp's model `llama` runs it: BPE by scores over the whole text, bytes for unknown characters.

Of all neighbours whose joined text is a token, those join first whose token has the highest score, the leftmost first
where scores are equal. A space is written as U+2581; texts, and what follows a special token, get one in front where
`prefix` is set.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

from ramp_jax.models.tokenizers.vocabulary import SPACE


def backend(tokens: Sequence[str], scores: Sequence[float], prefix: bool) -> Tokenizer:
    """A tokenizer of `tokenizers` with these tokens by id; special tokens are the caller's."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    built = Tokenizer(
        models.BPE(vocabulary, merges(vocabulary, scores), byte_fallback=True, fuse_unk=False, unk_token=None)
    )
    escape = normalizers.Replace(" ", SPACE)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return built


def merges(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the order of scores."""
    ways = [
        (-scores[i], i, cut, token)
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(token[:cut], token[cut:]) for _, _, cut, token in sorted(ways)]
