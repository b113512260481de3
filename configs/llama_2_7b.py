r"""Llama-2-7B, the paper's model: a policy to carry over to others, and files from 2.212 to 7.160 GB.

    python launch/train.py --config=configs/llama_2_7b.py --workdir=runs/llama-2-7b
    python launch/allocate.py --model=meta-llama/Llama-2-7b-hf --source_policy=runs/llama-2-7b \
        --budget_gb=3.68 --dtype=bfloat16 --context=2048 --count=16 \
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:train --output=llama-2-7b.json
    python launch/export_gguf.py --model=meta-llama/Llama-2-7b-hf \
        --allocation=llama-2-7b.json --output=llama-2-7b.gguf
    python launch/evaluate.py --model=llama-2-7b.gguf --reference=meta-llama/Llama-2-7b-hf --protocol=sliding \
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:test --split=all

Its rows hold every level. The paper reports perplexity 5.54 at 3.68 GB and 3.65 bits (FP16 5.47, AWQ 5.60 at 3.90 GB);
that size has 3.90 stored bits per linear weight, and the embedding and the head in F16 (benchmarks/results/sizes.md).
Not run here yet. While it measures, the weights lie in memory as loaded, folded, and folded in f32: about 8 bytes each,
54 GB. Half of the episodes lack the lowest levels and all embeddings are shifted, as for `pretrained`, so that the
policy transfers.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

TEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("meta-llama/Llama-2-7b-hf",),
        dtype="bfloat16",
        levels=(2, 3, 4, 4.5, 5, 6, 8),
        calibration=WindowsConfig(TEXT, context=2048, count=16),
        sensitivity=WindowsConfig(TEXT, context=512, count=4),
        train=TrainConfig(iterations=80, narrowed=0.5, shift=0.5, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
