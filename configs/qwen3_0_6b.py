r"""Qwen3-0.6B, norms of queries and keys and a tied embedding: files from 0.196 to 0.634 GB.

    python launch/train.py --config=configs/qwen3_0_6b.py --workdir=runs/qwen3-0.6b
    python launch/allocate.py --model=Qwen/Qwen3-0.6B --source_policy=runs/qwen3-0.6b \
        --budget_gb=0.34 --dtype=bfloat16 --context=2048 --count=16 \
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:train --output=qwen3-0.6b.json
    python launch/export_gguf.py --model=Qwen/Qwen3-0.6B \
        --allocation=qwen3-0.6b.json --output=qwen3-0.6b.gguf

Its vocabulary adds 6 MB. Rows are of 1,024, 2,048 and 3,072 weights and hold every level. Not run here yet.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

TEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("Qwen/Qwen3-0.6B",),
        dtype="bfloat16",
        levels=(2, 3, 4, 4.5, 5, 6, 8),
        calibration=WindowsConfig(TEXT, context=2048, count=16),
        sensitivity=WindowsConfig(TEXT, context=512, count=4),
        train=TrainConfig(iterations=120, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
