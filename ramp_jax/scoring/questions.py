"""A multiple-choice task that works offline: which of four endings continues a passage of the built-in text?

The true ending is the one that stands there, the others stand elsewhere in the same text, so the answers are known.
Passages come from the end of the text, which calibration never sees.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ramp_jax import data
from ramp_jax.files import write_bytes

TASK = "passages"

_SHARE = 0.15  # of the text, from its end
_CONTEXT_WORDS, _ENDING_WORDS = 24, 8
_CHOICES = 4
_STRIDE = 7  # passages between one whose ending is borrowed and the next


def passages() -> list[Mapping[str, object]]:
    """Questions in text order: `context`, four `choices`, and the index `answer` of the true one."""
    text = data.read_text("builtin")
    words = text[-int(_SHARE * len(text)) :].split()[1:]  # the first word may be cut
    size = _CONTEXT_WORDS + _ENDING_WORDS
    parts = [words[i : i + size] for i in range(0, len(words) - size + 1, size)]
    contexts = [" ".join(part[:_CONTEXT_WORDS]) for part in parts]
    endings = [" ".join(part[_CONTEXT_WORDS:]) for part in parts]
    questions: list[Mapping[str, object]] = []
    for i, context in enumerate(contexts):
        answer = i % _CHOICES
        choices = [endings[(i + _STRIDE * k) % len(endings)] for k in range(1, _CHOICES)]
        choices.insert(answer, endings[i])
        questions.append({"context": context, "choices": choices, "answer": answer})
    return questions


def write_task(folder: Path) -> None:
    """Write the questions and their description as lm-eval reads them: `passages.jsonl` and `passages.yaml`."""
    lines = "".join(json.dumps(question) + "\n" for question in passages())
    write_bytes(folder / f"{TASK}.jsonl", lines.encode())
    description = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / f"{TASK}.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    write_bytes(folder / f"{TASK}.yaml", json.dumps(description, indent=1).encode())  # JSON is YAML
