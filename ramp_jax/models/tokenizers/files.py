"""JSON beside a tokenizer."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file; raises `ValueError` for anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; download or save it again.")
    return content
