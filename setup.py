"""Package metadata: `pip install .`, or with extras `pip install .[verify,test]`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "ramp_jax/__init__.py").read_text().splitlines() if "__version__" in line
)

setup(
    name="ramp-jax",
    version=VERSION,
    description="Mixed-precision GGUF quantization by a learned policy, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["jax", "quantization", "gguf", "llama.cpp", "mixed precision", "reinforcement learning"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*find_packages(include=["ramp_jax", "ramp_jax.*"]), "ramp_jax.launch"],
    package_dir={"ramp_jax.launch": "launch"},
    entry_points={
        "console_scripts": [
            f"ramp-{name} = ramp_jax.cli.commands:{name}" for name in ("train", "allocate", "export", "evaluate")
        ]
    },
    package_data={
        "ramp_jax": [
            "halo/report/*.css",
            "languages.txt",
            "policy/pretrained/*",
            "refs/*/*.json",
            "refs/*/*.safetensors",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.5",
        "chex>=0.1.92",
        "datasets>=5.2",
        "flax>=0.12.8",
        "gguf>=0.19",
        "huggingface_hub>=2.4",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "matplotlib>=3.11",
        "ml_collections>=1.1",
        "numpy>=2.4",
        "optax>=0.2.8",
        "protobuf>=7.36.1",
        "safetensors>=0.8",
        "scipy>=1.17",
        "sentencepiece>=0.2.1",
        "tokenizers>=0.23",
        "tqdm>=4.70",
        "transformers>=5.23",
    ],
    extras_require={
        "verify": ["llama-cpp-python>=0.3.36"],
        "tasks": ["lm_eval>=0.4.13"],
        "test": [
            "hypothesis>=6.170",
            "lm_eval>=0.4.13",
            "orbax-checkpoint>=0.11",
            "pyrefly>=1.5",
            "pytest>=9.2",
            "pytest-instafail>=0.5",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "torch==2.13.0",
        ],
        "cuda12": ["jax[cuda12]>=0.10.2"],
        "cuda13": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
    },
)
