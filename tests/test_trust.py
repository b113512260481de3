"""No code that comes with a model is run, and nobody is asked whether it may be."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from ramp_jax.allocation import Allocation
from ramp_jax.halo.export import export_gguf

PLANTED = """
    from pathlib import Path

    Path({ran!r}).touch()

    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    class Planted(PreTrainedTokenizerFast):
        pass

    class PlantedConfig(PretrainedConfig):
        model_type = "planted"
"""
LOADERS = """
    import sys
    from pathlib import Path
    from ramp_jax.halo.torch_model import torch_model
    from ramp_jax.models import load_model, save_model
    from ramp_jax.models.load import read_description
    from ramp_jax.refs import make

    folder, exported = Path(sys.argv[1]), Path(sys.argv[2])
    model = load_model(folder)
    load_model(folder, resident=False).in_memory()
    load_model(folder, tokenizer_from=exported)
    load_model(exported, tokenizer_from=exported)
    loaded = load_model(exported)
    read_description(exported)
    assert model.tokenizer.encode("text") == loaded.tokenizer.encode("text")
    load_model(save_model(model, folder.parent / "saved"))
    torch_model(model)
    make._tokenizer("", 0, folder, print)
    assert sys.stdin.readline() == "y\\n", "the terminal was read"
"""
CONTROL = """
    import sys
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(sys.argv[1])
"""


def plant(folder: Path, ran: Path) -> None:
    """Files that have transformers run `planted.py`, which leaves a trace, where it is allowed."""
    (folder / "planted.py").write_text(textwrap.dedent(PLANTED.format(ran=str(ran))))
    for name, classes in {
        "tokenizer_config.json": {"AutoTokenizer": [None, "planted.Planted"]},
        "config.json": {"AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.Planted"},
    }.items():
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        more = {"tokenizer_class": "Planted"} if name.startswith("tokenizer") else {}
        path.write_text(json.dumps(content | more | {"auto_map": classes}))


def run_with_yes(code: str, *arguments: Path) -> subprocess.CompletedProcess:
    """A process whose standard input says yes to every question."""
    settings = {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": "modules"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    where = {"cwd": arguments[0].parent, "env": os.environ | settings}
    return subprocess.run(command, input="y\n" * 100, capture_output=True, text=True, check=False, **where)


def test_planted_code_does_not_run(untied, untied_directory, tmp_path):
    """Whoever loads; transformers itself, asked as most programs do, runs it."""
    folder, beside, ran = tmp_path / "model", tmp_path / "beside", tmp_path / "ran"
    folder.mkdir()
    beside.mkdir()
    for file in untied_directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    export_gguf(untied, Allocation.uniform(untied, "F16"), beside / "model.gguf")
    plant(folder, ran)
    plant(beside, ran)
    found = run_with_yes(LOADERS, folder, beside / "model.gguf")
    assert found.returncode == 0, found.stderr
    assert "[y/N]" not in found.stdout + found.stderr
    assert not ran.exists()
    asked = run_with_yes(CONTROL, folder)
    assert ran.exists(), asked.stderr
    assert "[y/N]" in asked.stdout + asked.stderr
