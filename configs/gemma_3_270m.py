r"""Gemma-3-270M, windows of 512 tokens in five of six layers: files from 0.143 to 0.285 GB.

    python launch/train.py --config=configs/gemma_3_270m.py --workdir=runs/gemma-3-270m
    python launch/allocate.py --model=google/gemma-3-270m --source_policy=runs/gemma-3-270m \
        --budget_gb=0.17 --dtype=bfloat16 --context=2048 --count=16 \
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:train --output=gemma-3-270m.json
    python launch/export_gguf.py --model=google/gemma-3-270m \
        --allocation=gemma-3-270m.json --output=gemma-3-270m.gguf

Its vocabulary adds 7 MB. Only attn_output (rows of 1,024) and ffn_down (2,048) hold every level; all other rows are of
640 weights, which only blocks of 32 divide: 4 (IQ4_NL), 5 (Q5_0), 6 (Q5_1) and 8 (Q8_0), the rest masked. Five eighths
of the weights are the embedding, which is the head as well. Not run here yet.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

TEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("google/gemma-3-270m",),
        dtype="bfloat16",
        levels=(2, 3, 4, 4.5, 5, 6, 8),
        calibration=WindowsConfig(TEXT, context=2048, count=16),
        sensitivity=WindowsConfig(TEXT, context=512, count=4),
        train=TrainConfig(iterations=120, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
