"""Commonsense tasks through lm-eval: accuracy of a model, and the share that it retains of a reference's.

Needs the `tasks` extra (lm_eval). Where the hub is not reachable, `passages` is a task of this project that is always
there, and any folder of lm-eval's YAML files with local data serves.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ramp_jax.models import Model
from ramp_jax.scoring import questions
from ramp_jax.scoring.likelihood import log_likelihoods


class JaxLM(TemplateLM):
    """A model as lm-eval sees one: log-likelihoods only, nothing is generated."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, where there is none EOS."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; begins with BOS where the tokenizer adds one and the text does not bring it."""
        if add_special_tokens is None:
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return log_likelihoods(self.model, [(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts; windows of the model's context that do not overlap."""
        limit, pairs, owners = self.model.spec.context_length, [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, limit, 1)
            pairs += (cut := [make_disjoint_window(window) for window in windows])
            owners += [i] * len(cut)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(owners, log_likelihoods(self.model, pairs), strict=True):
            totals[i] += log_p
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        """Raise `NotImplementedError`: there is no decoding loop here."""
        name = getattr(requests[0], "task_name", None)
        raise NotImplementedError(
            f"task {name!r} generates text, which only log-likelihoods are there for; choose multiple-choice tasks, or "
            f"export a GGUF and run it in llama.cpp."
        )


def accuracies(
    model: Model, names: Sequence[str], *, folder: Path | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Per task: number of `examples`, `acc` and, where the task has it, `acc_norm`, each with `*_stderr`.

    Tasks are lm-eval's, those of the YAML files in `folder`, and `passages`; `limit` takes the first examples of each.
    Raises `FileNotFoundError` for a task that is unknown or whose data cannot be reached, `ValueError` for one that
    has no accuracy or a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so no task can be read; add its tokenizer files.")
    with tempfile.TemporaryDirectory() as own:
        questions.write_task(Path(own))
        manager = _manager(names, [own, *([str(folder)] if folder else [])])
        found = lm_eval.simple_evaluate(
            JaxLM(model),
            tasks=_load(manager, names),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    return {name: _numbers(name, row, found["n-samples"][name]["effective"]) for name, row in found["results"].items()}


def _manager(names: Sequence[str], folders: list[str]) -> TaskManager:
    """Knows the tasks of the folders; lm-eval's thousands, which take long to read, only if one of those is named."""
    manager = TaskManager(include_path=folders, include_defaults=False)
    return manager if set(names) <= set(manager.all_tasks) else TaskManager(include_path=folders)


def _load(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """The tasks with their data, groups spread out."""
    tasks = {}
    for name in names:
        if name not in manager.all_tasks:
            raise FileNotFoundError(
                f"task {name!r} is neither one of lm-eval's nor in a YAML file of --task_path; "
                f"{questions.TASK!r} is always there."
            )
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:
            cause = next(iter(str(error).splitlines()), "")[:200]
            raise FileNotFoundError(
                f"the data of task {name!r} could not be read ({type(error).__name__}: {cause}); offline choices are "
                f"{questions.TASK!r} and --task_path=DIR with YAML files whose data is local."
            ) from error
    return list(tasks.values())


def _numbers(name: str, row: dict[str, Any], examples: int) -> dict[str, float]:
    """One row of lm-eval's results in plain words."""
    plain = {key.removesuffix(",none"): value for key, value in row.items()}
    if "acc" not in plain:
        raise ValueError(f"task {name!r} reports no accuracy; choose multiple-choice tasks.")
    metrics = [key for key in ("acc", "acc_norm") if key in plain]
    return {"examples": examples} | {key: plain[key] for m in metrics for key in (m, f"{m}_stderr")}


def compared(found: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, dict[str, float]]:
    """`accuracies` beside the reference's, and the mean over tasks in row `mean`.

    `score` is acc_norm where a task has it, else acc; `reference` is that of the reference, `retained` their ratio.
    """
    rows = {name: {**row, "score": _score(row)} for name, row in found.items()}
    rows["mean"] = {"score": _mean([row["score"] for row in rows.values()])}
    if reference is not None:
        scores = {name: _score(row) for name, row in reference.items()}
        for name, score in (scores | {"mean": _mean(list(scores.values()))}).items():
            rows[name] |= {"reference": score, "retained": rows[name]["score"] / score if score else math.nan}
    return rows


def _score(row: dict[str, float]) -> float:
    return row.get("acc_norm", row["acc"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def text_table(rows: dict[str, dict[str, float]]) -> str:
    """The rows of `compared`, aligned."""
    columns = ("acc", "acc_norm", "score", "reference", "retained")
    lines = [f"{'task':<20}{'examples':>10}" + "".join(f"{title:>18}" for title in columns)]
    for name, row in rows.items():
        cells = "".join(f"{_cell(row, key):>18}" for key in columns)
        lines.append(f"{name:<20}{row.get('examples', ''):>10}{cells}".rstrip())
    return "\n".join(lines)


def _cell(row: dict[str, float], key: str) -> str:
    if key not in row:
        return ""
    return f"{row[key]:.2%}" + (f" ± {row[key + '_stderr']:.2%}" if f"{key}_stderr" in row else "")
