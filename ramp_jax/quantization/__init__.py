"""Calibration, Scale Folding and fake-quantization."""

from ramp_jax.quantization.calibrate import Stats, calibrate
from ramp_jax.quantization.encoder import DEFAULT_ENCODER, REFERENCE, Encoder, EncoderName
from ramp_jax.quantization.encoder_factory import make_encoder, recorded_encoder
from ramp_jax.quantization.fake_quant import decoded, fake_quantize
from ramp_jax.quantization.fold import calibrate_and_fold, fold, refold
from ramp_jax.quantization.importance import importance_of, read_imatrix, write_imatrix

__all__ = [
    "DEFAULT_ENCODER",
    "REFERENCE",
    "Encoder",
    "EncoderName",
    "Stats",
    "calibrate",
    "calibrate_and_fold",
    "decoded",
    "fake_quantize",
    "fold",
    "importance_of",
    "make_encoder",
    "read_imatrix",
    "recorded_encoder",
    "refold",
    "write_imatrix",
]
