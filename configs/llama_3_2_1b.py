r"""Llama-3.2-1B, a tied embedding and positions scaled by `llama3`: files from 0.406 to 1.313 GB.

    python launch/train.py --config=configs/llama_3_2_1b.py --workdir=runs/llama-3.2-1b
    python launch/allocate.py --model=meta-llama/Llama-3.2-1B --source_policy=runs/llama-3.2-1b \
        --budget_gb=0.7 --dtype=bfloat16 --context=2048 --count=16 \
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:train --output=llama-3.2-1b.json
    python launch/export_gguf.py --model=meta-llama/Llama-3.2-1B \
        --allocation=llama-3.2-1b.json --output=llama-3.2-1b.gguf

Its vocabulary adds 8 MB. Rows hold every level. A fifth of the weights is the embedding, which is the head as well. Not
run here yet.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

TEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("meta-llama/Llama-3.2-1B",),
        dtype="bfloat16",
        levels=(2, 3, 4, 4.5, 5, 6, 8),
        calibration=WindowsConfig(TEXT, context=2048, count=16),
        sensitivity=WindowsConfig(TEXT, context=512, count=4),
        train=TrainConfig(iterations=120, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
