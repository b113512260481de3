"""SentencePiece's own file, `tokenizer.model`: its pieces with scores and types."""

import dataclasses
from pathlib import Path

from ramp_jax.models.tokenizers.vocabulary import SPACE, Kind

_BPE = 2  # of TrainerSpec.ModelType


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Tokens by id with score and type; `prefix`: texts get a space in front. User-defined tokens have real spaces."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    prefix: bool
    bos: int
    eos: int
    unk: int

    def roles(self) -> dict[str, str]:
        """The special tokens by transformers' names."""
        ids = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unk}
        return {role: self.tokens[i] for role, i in ids.items() if 0 <= i < len(self.tokens)}


def read_pieces(path: Path) -> Pieces:
    """Raises `ValueError` for a damaged file, and for a model that llama.cpp does not run under the name `llama`."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}); download it again.") from error
    if not model.pieces:
        raise ValueError(f"{path} is a SentencePiece model without pieces; download it again.")
    trained, normalizer = model.trainer_spec, model.normalizer_spec
    for expected, what in (
        (trained.model_type == _BPE, "it is no BPE"),
        (not normalizer.precompiled_charsmap, f"it normalizes texts ({normalizer.name})"),
        (not normalizer.remove_extra_whitespaces, "it removes white space"),
        (normalizer.escape_whitespaces, "it does not escape spaces"),
        (not trained.treat_whitespace_as_suffix, "it puts spaces behind words"),
    ):
        if not expected:
            raise ValueError(f"{path}: llama.cpp cannot run this SentencePiece model, since {what}; {WAY_OUT}")
    tokens = tuple(
        piece.piece.replace(SPACE, " ") if piece.type == Kind.USER_DEFINED else piece.piece for piece in model.pieces
    )
    return Pieces(
        tokens,
        tuple(piece.score for piece in model.pieces),
        tuple(piece.type for piece in model.pieces),
        normalizer.add_dummy_prefix,
        trained.bos_id,
        trained.eos_id,
        trained.unk_id,
    )


WAY_OUT = "take the tokenizer of a GGUF of this model with --tokenizer_from=FILE.gguf."
