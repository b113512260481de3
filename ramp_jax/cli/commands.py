"""The commands that an installation brings: the scripts of `launch/` under names of their own."""

import importlib

from ramp_jax.cli.running import run


def train() -> None:
    """`ramp-train`: launch/train.py."""
    _run("train")


def allocate() -> None:
    """`ramp-allocate`: launch/allocate.py."""
    _run("allocate")


def export() -> None:
    """`ramp-export`: launch/export_gguf.py."""
    _run("export_gguf")


def evaluate() -> None:
    """`ramp-evaluate`: launch/evaluate.py."""
    _run("evaluate")


def _run(script: str) -> None:
    run(importlib.import_module(f"ramp_jax.launch.{script}").main)
