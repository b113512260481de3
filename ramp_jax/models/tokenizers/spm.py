"""SentencePiece as llama.cpp's model `llama` runs it: BPE by scores over the whole text, bytes for unknown characters.

Of all neighbours whose joined text is a token, those join first whose token has the highest score, the leftmost first
where scores are equal. A space is written as U+2581; texts, and what follows a special token, get one in front where
`prefix` is set.
"""

import heapq
from collections.abc import Collection
from typing import Any

from tokenizers import NormalizedString, PreTokenizedString, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast

from ramp_jax.models.tokenizers.vocabulary import SPACE, WAY_OUT

_LONGEST = 512  # characters of a token, since ways to make it take the square of that

Scores = dict[str, float]  # by token


def backend(vocabulary: dict[str, int], scores: Scores, prefix: bool) -> Tokenizer:
    """A tokenizer with these ids; `scores` are those of the tokens that merging may make."""
    if too_long := next((token for token in scores if len(token) > _LONGEST), None):
        raise ValueError(
            f"token {too_long!r:.60} has {len(too_long):,} characters, of which {_LONGEST} can merge; {WAY_OUT}"
        )
    built = Tokenizer(models.BPE(vocabulary, _merges(vocabulary, scores), byte_fallback=True))
    escape = normalizers.Replace(" ", SPACE)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return built


def _merges(vocabulary: dict[str, int], scores: Scores) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the order of scores.

    Two ways to the same token never compete: what merging makes of a token's text alone has one last step.
    """
    ways = [
        (-score, token, cut)
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(token[:cut], token[cut:]) for _, token, cut in sorted(ways)]


def ranks_suffice(vocabulary: dict[str, int], scores: Scores) -> bool:
    """Whether ranks of merges, which know no ties and no unknown characters, do what scores do."""
    longer = {token: score for token, score in scores.items() if len(token) > 1}
    unknown = (token for token in longer if token[0] not in vocabulary or token[-1] not in vocabulary)
    if any(can_be_made(token, vocabulary) for token in unknown):
        return False
    if len(set(longer.values())) == len(longer):
        return True
    made = [score for token, score in longer.items() if can_be_made(token, vocabulary)]
    return len(set(made)) == len(made)


def can_be_made(token: str, vocabulary: Collection[str]) -> bool:
    """Whether a token's text is that of two others, or of characters that no token has."""

    def part(text: str) -> bool:
        return len(text) == 1 or text in vocabulary

    return any(part(token[:cut]) and part(token[cut:]) for cut in range(1, len(token)))


class ByScore:
    """A custom pre-tokenizer that cuts texts into tokens by scores, ties and unknown characters included.

    The model behind it has to take whole words.
    """

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Cut every part of the text."""
        text.split(self._cut)

    def _cut(self, _: int, part: NormalizedString) -> list[NormalizedString]:
        return _halved(part, self._ends(part.normalized))

    def _ends(self, text: str) -> list[int]:
        """Where tokens end, of symbols that begin as single characters and join."""
        end = list(range(1, len(text) + 1))  # by start of a symbol; 0: it was joined to the one before
        before = list(range(-1, len(text)))  # by start: the start of the symbol before
        queue: list[tuple[float, int, int]] = []

        def offer(left: int) -> None:
            right = end[left] if left >= 0 else len(text)
            if right < len(text) and (score := self._scores.get(text[left : end[right]])) is not None:
                heapq.heappush(queue, (-score, left, end[right]))

        for left in range(len(text) - 1):
            offer(left)
        while queue:
            _, left, stop = heapq.heappop(queue)
            right = end[left]
            if not left < right < len(text) or end[right] != stop:
                continue  # one of the two has changed since
            end[left], end[right] = stop, 0
            before[stop] = left
            offer(before[left])
            offer(left)
        ends, at = [], 0
        while at < len(text):
            at = end[at]
            ends.append(at)
        return ends


def _halved(part: NormalizedString, ends: list[int]) -> list[NormalizedString]:
    """The pieces that end at `ends`; a slice takes as long as what it is cut from, so halves are cut first."""
    if len(ends) < 2:
        return [part]
    half = len(ends) // 2
    middle = ends[half - 1]
    return _halved(part[:middle], ends[:half]) + _halved(part[middle:], [end - middle for end in ends[half:]])


class ScoredTokenizer(PreTrainedTokenizerFast):
    """A tokenizer behind `ByScore`, which `tokenizers` cannot store."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises `ValueError`: a `tokenizer.json` knows ranks of merges, and these scores are no ranks."""
        raise ValueError(
            f"a tokenizer that merges by scores, some of them equal, cannot be saved to {save_directory}, since a "
            f"tokenizer.json ranks merges; take the tokenizer of the model that the GGUF was made from."
        )


def use_scores(built: Tokenizer, vocabulary: dict[str, int], scores: Scores) -> None:
    """Let a tokenizer of `backend` go by scores themselves in place of ranks."""
    built.model = models.BPE(vocabulary, [], byte_fallback=True, ignore_merges=True)
    built.pre_tokenizer = PreTokenizer.custom(ByScore(scores))
