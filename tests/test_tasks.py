"""Log-likelihoods against transformers, and tasks through lm-eval against answers picked by hand."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from scipy.special import log_softmax

from ramp_jax import data, workflow
from ramp_jax.allocation import from_levels
from ramp_jax.models.decoder import block_forward
from ramp_jax.scoring import likelihood, questions
from ramp_jax.scoring.likelihood import bucket, log_likelihoods
from ramp_jax.scoring.tasks import JaxLM, accuracies, compared, text_table

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LIMIT = 256


def in_torch(context, continuation):
    """ln p and greediness of a continuation by transformers, one forward pass for each."""
    ids = (list(context) + list(continuation))[-LIMIT - 1 :]
    with torch.no_grad():
        logits = tiny.hf_model(False)(torch.tensor([ids[:-1]])).logits[0, -len(continuation) :].numpy()
    log_p = log_softmax(logits.astype(np.float64), axis=-1)
    return log_p[np.arange(len(continuation)), continuation].sum(), (log_p.argmax(-1) == continuation).all()


def test_log_likelihoods_equal_transformers(untied, rng):
    """Of many lengths, with shared prefixes, cut from the left where the model's context ends; one program a bucket."""
    pairs = [(rng.integers(0, 320, rng.integers(1, 22)), rng.integers(0, 320, rng.integers(1, 9))) for _ in range(25)]
    pairs += [(pairs[0][0], np.append(pairs[0][1][:-1], token)) for token in (5, 6, 7)]
    pairs += [(rng.integers(0, 320, LIMIT + 40), rng.integers(0, 320, 20)), ([3], rng.integers(0, 320, LIMIT))]
    pairs = [(list(map(int, context)), list(map(int, continuation))) for context, continuation in pairs]
    block_forward.clear_cache()
    likelihood._rows.clear_cache()
    answers = log_likelihoods(untied, pairs)
    lengths = [min(len(context) + len(continuation) - 1, LIMIT) for context, continuation in pairs]
    assert block_forward._cache_size() == len({bucket(n, LIMIT) for n in lengths}) == 4
    assert likelihood._rows._cache_size() == 1
    for (log_p, greedy), (context, continuation) in zip(answers, pairs, strict=True):
        expected, expected_greedy = in_torch(context, continuation)
        assert log_p == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy


def test_greedy_continuations_are_known(untied):
    context = [3, 14, 15]
    likeliest = int(np.argmax(np.asarray(untied.logits(np.array([context])))[0, -1]))
    answers = log_likelihoods(untied, [(context, [token]) for token in range(320)])
    assert [token for token, (_, greedy) in enumerate(answers) if greedy] == [likeliest]
    assert sum(math.exp(log_p) for log_p, _ in answers) == pytest.approx(1, abs=1e-5)


def test_buckets_by_hand():
    lengths = (1, 16, 17, 24, 25, 33, 49, 65, 97, 200)
    assert [bucket(n, 10_000) for n in lengths] == [16, 16, 24, 24, 32, 48, 64, 96, 128, 256]
    assert bucket(65, 80) == 80


def test_requests_that_cannot_be_scored(untied):
    with pytest.raises(ValueError, match="request 1 has 0 tokens of context and 1 of continuation"):
        log_likelihoods(untied, [([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match=r"request 0 has 1 tokens of context and 257 .* scores at most 256"):
        log_likelihoods(untied, [([1], [2] * 257)])
    with pytest.raises(ValueError, match="holds token 320, the model's vocabulary ends at 319"):
        log_likelihoods(untied, [([320], [2])])
    broken = tiny.changed(untied, "output_norm.weight", lambda w: w * jnp.nan)
    with pytest.raises(ValueError, match=r"log-likelihood is not finite, first in the weights of output_norm\.weight"):
        log_likelihoods(broken, [([1], [2])])


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_whole_texts_equal_transformers(untied):
    """Every token once, the first after BOS, those of the last window after as much as the model reads."""
    text = data.read_text("builtin")[:1500]
    tokens = untied.tokenizer.encode(text)
    assert len(tokens) > LIMIT
    lm = JaxLM(untied)
    found = lm.loglikelihood_rolling([request("loglikelihood_rolling", part) for part in (text, "short")])
    line = [untied.tokenizer.bos_token_id, *tokens]
    starts = range(1, len(line), LIMIT)
    assert found[0] == pytest.approx(sum(in_torch(line[:i], line[i : i + LIMIT])[0] for i in starts), abs=1e-2)
    short = untied.tokenizer.encode("short")
    assert found[1] == pytest.approx(in_torch(line[:1], short)[0], abs=1e-3)


def test_texts_are_cut_as_by_transformers(untied):
    """The blank belongs to the continuation; BOS or what the text brings stands before; nothing is generated."""
    lm = JaxLM(untied)
    pairs = [("Assert statements ", "are"), ("Assert statements", " are"), ("", "are")]
    first, second, third = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    assert first == second
    context, whole = map(untied.tokenizer.encode, ("Assert statements", "Assert statements are"))
    assert first[0] == pytest.approx(in_torch(context, whole[len(context) :])[0], abs=1e-3)
    alone = in_torch([untied.tokenizer.bos_token_id], untied.tokenizer.encode("are"))
    assert third[0] == pytest.approx(alone[0], abs=1e-3)
    with pytest.raises(NotImplementedError, match="generates text, which only log-likelihoods are there for"):
        lm.generate_until([request("generate_until", "a", {})])


def test_passages_have_known_answers():
    text = " ".join(data.read_text("builtin").split())
    asked = questions.passages()
    assert asked == questions.passages()
    assert len(asked) > 250
    for question in asked:
        ending = question["choices"][question["answer"]]
        assert f"{question['context']} {ending}" in text
        assert len(question["choices"]) == 4
    counts = np.bincount([question["answer"] for question in asked])
    assert np.ptp(counts) <= 1
    unique = [question for question in asked if len(set(question["choices"])) == 4]
    assert len(unique) > 0.97 * len(asked)


def test_passages_are_not_calibrated_on(untied):
    text = data.read_text("builtin")
    tokens = untied.tokenizer.encode(text)
    calibration = untied.tokenizer.decode(tokens[: int(0.8 * len(tokens))])
    assert len(calibration) < 0.85 * len(text)


@pytest.fixture
def folder(tmp_path):
    """A local task: yes or no, without acc_norm."""
    rows = [{"q": f"Is {i} even?", "answer": i % 2} for i in range(12)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "quiz.yaml").write_text(
        f"""
task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "quiz.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - metric: acc
"""
    )
    return tmp_path


def picked(tokenizer, context, choices):
    """Index of the likeliest ending, and of the likeliest per character, by transformers."""
    start, sums = tokenizer.encode(context), []
    for choice in choices:
        whole = tokenizer.encode(f"{context} {choice}")
        sums.append(in_torch(start, whole[len(start) :])[0])
    return int(np.argmax(sums)), int(np.argmax(np.divide(sums, [len(choice) for choice in choices])))


def test_accuracies_equal_answers_picked_by_transformers(untied, folder):
    found = accuracies(untied, ["passages", "quiz"], folder=folder, limit=10)
    asked = questions.passages()[:10]
    right = np.array([np.equal(picked(untied.tokenizer, q["context"], q["choices"]), q["answer"]) for q in asked])
    even = [picked(untied.tokenizer, f"Is {i} even?", ["yes", "no"])[0] == i % 2 for i in range(10)]
    passages, quiz = found["passages"], found["quiz"]
    assert 0 < right[:, 0].mean() < 1
    assert (passages["acc"], passages["acc_norm"]) == tuple(right.mean(axis=0))
    assert passages["acc_stderr"] == pytest.approx(right[:, 0].std(ddof=1) / math.sqrt(10))
    assert passages["examples"] == quiz["examples"] == 10
    assert quiz["acc"] == np.mean(even)
    assert "acc_norm" not in quiz


def test_comparison_by_hand():
    ours = {"a": {"examples": 4, "acc": 0.5, "acc_norm": 0.75, "acc_stderr": 0.1}, "b": {"examples": 9, "acc": 0.25}}
    theirs = {"a": {"acc": 0.9, "acc_norm": 1.0}, "b": {"acc": 0.5}}
    rows = compared(ours, theirs)
    assert {name: row["retained"] for name, row in rows.items()} == {"a": 0.75, "b": 0.5, "mean": 0.5 / 0.75}
    assert rows["mean"]["reference"] == 0.75
    assert rows["a"]["score"] == 0.75
    lines = text_table(rows).splitlines()
    assert lines[1].split() == ["a", "4", "50.00%", "±", "10.00%", "75.00%", "75.00%", "100.00%", "75.00%"]
    assert lines[3].split() == ["mean", "50.00%", "75.00%", "66.67%"]
    assert "retained" not in compared(ours, None)["mean"]
    assert math.isnan(compared(ours, {"a": {"acc": 0.0}, "b": {"acc": 0.5}})["a"]["retained"])


def test_data_of_a_task_that_cannot_be_reached(untied, folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = folder / "quiz.yaml"
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: owner/never-published"))
    with pytest.raises(FileNotFoundError, match=r"task 'quiz' could not be read .* offline choices are 'passages'"):
        accuracies(untied, ["quiz"], folder=folder)


def test_task_that_nobody_knows(untied, monkeypatch):
    """lm-eval's own tasks are left out of the search, which takes long."""

    def few(include_path, include_defaults=True):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("ramp_jax.scoring.tasks.TaskManager", few)
    with pytest.raises(FileNotFoundError, match="task 'piqua' is neither one of lm-eval's nor in a YAML file of"):
        accuracies(untied, ["piqua"])


def test_without_tokenizer_or_lm_eval(untied, monkeypatch):
    with pytest.raises(ValueError, match="has no tokenizer, so no task can be read"):
        accuracies(type(untied)(untied.spec, untied.params, untied.metadata), ["passages"])
    monkeypatch.delitem(sys.modules, "ramp_jax.scoring.tasks")
    monkeypatch.delattr("ramp_jax.scoring.tasks")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match=r"lm-eval is not installed .*; run `pip install 'ramp-jax\[tasks\]'`"):
        workflow.evaluate_tasks(untied, ["passages"])


def test_share_retained_by_a_quantized_model(untied, tmp_path):
    path = tmp_path / "alloc.json"
    from_levels(untied, [8] * 23).save(path)
    rows = workflow.evaluate_tasks(untied, ["passages"], reference=untied, allocation=path, limit=8)
    assert rows["passages"]["retained"] == rows["passages"]["acc_norm"] / rows["passages"]["reference"]
    same = workflow.evaluate_tasks(untied, ["passages"], reference=untied, limit=8)
    assert same["mean"]["retained"] == 1
