"""SentencePiece's own file, `tokenizer.model`: its pieces with scores and types."""

import dataclasses
import math
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken

from ramp_jax.models.source import reason, refuse_pointer
from ramp_jax.models.tokenizers.vocabulary import BYTES, SPACE, WAY_OUT, Kind, looks_special, padding, too_large

_BPE = 2  # of TrainerSpec.ModelType
_ADDED_SCORE = -1000.0  # as llama.cpp's converter writes


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Tokens by id with score and type; `prefix`: texts get a space in front."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    prefix: bool
    bos: int
    eos: int
    unk: int

    def with_added(self, added: dict[int, AddedToken], vocab_size: int, folder: Path) -> "Pieces":
        """With these tokens by id, some of which stand in place of pieces; ids between them are unused.

        Raises `ValueError` for an id that the vocabulary does not have.
        """
        size = max([len(self.tokens) - 1, *added]) + 1
        if size > vocab_size:
            raise ValueError(too_large(folder, size, vocab_size))
        more = range(len(self.tokens), size)
        tokens = [*self.tokens, *(padding(i) for i in more)]
        scores = [*self.scores, *(_ADDED_SCORE for _ in more)]
        kinds = [*self.kinds, *(Kind.UNUSED for _ in more)]
        for i, token in added.items():
            tokens[i], scores[i] = token.content, _ADDED_SCORE
            if i >= len(self.kinds) or self.kinds[i] not in (Kind.UNKNOWN, Kind.CONTROL):
                kinds[i] = Kind.CONTROL if token.special or looks_special(token.content) else Kind.USER_DEFINED
        tokens = [
            token.replace(SPACE, " ") if kind == Kind.USER_DEFINED else token
            for token, kind in zip(tokens, kinds, strict=True)
        ]
        return dataclasses.replace(self, tokens=tuple(tokens), scores=tuple(scores), kinds=tuple(kinds))

    def roles(self) -> dict[str, str]:
        """The special tokens by transformers' names."""
        ids = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unk}
        return {role: self.tokens[i] for role, i in ids.items() if 0 <= i < len(self.tokens)}


def _sound(piece: sentencepiece_model_pb2.ModelProto.SentencePiece) -> bool:
    return math.isfinite(piece.score) and piece.piece != "" and (piece.type != Kind.BYTE or piece.piece in BYTES)


def read_pieces(path: Path) -> Pieces:
    """Raises `ValueError` for a damaged file, and for a model that llama.cpp does not run under the name `llama`."""
    refuse_pointer(path)
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({reason(error)}); download it again.") from error
    if not model.pieces or not all(isinstance(piece.piece, str) for piece in model.pieces):  # bytes: not UTF-8
        raise ValueError(f"{path} is a SentencePiece model without pieces of text; download it again.")
    if sum(piece.type == Kind.UNKNOWN for piece in model.pieces) > 1:
        raise ValueError(f"{path} has two pieces for what is unknown; download it again.")
    odd = next((piece for piece in model.pieces if not _sound(piece)), None)
    if odd is not None:
        raise ValueError(
            f"{path}: piece {odd.piece!r:.60} has type {odd.type} and score {odd.score}, which do not fit; download it "
            f"again."
        )
    trained, normalizer = model.trainer_spec, model.normalizer_spec
    if trained.byte_fallback and sum(piece.type == Kind.BYTE for piece in model.pieces) != len(BYTES):
        raise ValueError(f"{path} has no piece for every byte, though it says so (byte_fallback); download it again.")
    for expected, what in (
        (trained.model_type == _BPE, "it is no BPE"),
        (not normalizer.precompiled_charsmap, f"it normalizes texts ({normalizer.name})"),
        (not normalizer.remove_extra_whitespaces, "it removes white space"),
        (normalizer.escape_whitespaces, "it does not escape spaces"),
        (not trained.treat_whitespace_as_suffix, "it puts spaces behind words"),
    ):
        if not expected:
            raise ValueError(f"{path}: llama.cpp cannot run this SentencePiece model, since {what}; {WAY_OUT}")
    return Pieces(
        tuple(piece.piece for piece in model.pieces),
        tuple(piece.score for piece in model.pieces),
        tuple(piece.type for piece in model.pieces),
        normalizer.add_dummy_prefix,
        trained.bos_id,
        trained.eos_id,
        trained.unk_id,
    )
