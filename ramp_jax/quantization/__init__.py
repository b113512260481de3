"""Calibration, Scale Folding and fake-quantization."""

from ramp_jax.quantization.calibrate import Stats, calibrate
from ramp_jax.quantization.fake_quant import fake_quantize
from ramp_jax.quantization.fold import fold, refold

__all__ = ["Stats", "calibrate", "fake_quantize", "fold", "refold"]
