r"""Llama-2-13B, to which the paper carries its policy over: files from 4.272 to 13.831 GB.

    python launch/train.py --config=configs/llama_2_13b.py --workdir=runs/llama-2-13b
    python launch/allocate.py --model=meta-llama/Llama-2-13b-hf --source_policy=runs/llama-2-13b \
        --budget_gb=6.9 --dtype=bfloat16 --context=2048 --count=16 \
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:train --output=llama-2-13b.json
    python launch/export_gguf.py --model=meta-llama/Llama-2-13b-hf \
        --allocation=llama-2-13b.json --output=llama-2-13b.gguf

With --source_policy=runs/llama-2-7b (configs/llama_2_7b.py) nothing is trained here, as in the paper. Rows hold every
level. While it measures, the weights lie in memory as loaded, folded, and folded in f32: about 8 bytes each, 104 GB,
more than most accelerators have; the policy of Llama-2-7B asks for the first two alone. Not run here yet.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

TEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("meta-llama/Llama-2-13b-hf",),
        dtype="bfloat16",
        levels=(2, 3, 4, 4.5, 5, 6, 8),
        calibration=WindowsConfig(TEXT, context=2048, count=16),
        sensitivity=WindowsConfig(TEXT, context=512, count=4),
        train=TrainConfig(iterations=120, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
