"""Files damaged on purpose: each is refused in one sentence, or loaded as it is.

The suite `fuzz` of launch/benchmark.py runs more of them; `python -m mutations --verbose` in this folder shows those
that fail.
"""

import sys
from pathlib import Path

from mutations import faulty, runner

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks.fuzz import cases, table

BAD = ("wrong", "crashed", "hung", "memory")


def test_damaged_files_are_refused_or_right():
    found = cases("--cases", "200")
    assert [case for case in found if case["outcome"] in BAD] == []
    rows = table(found)
    assert [row["kind"] for row in rows] == sorted(runner.kinds())
    assert sum(row["refused"] + row["right"] for row in rows) == 200
    assert all(row["refused"] for row in rows)
    assert sum(row["right"] for row in rows) > 20


def test_a_runner_calls_every_failure_by_its_name():
    found = cases("--kinds", "faulty", "--cases", str(len(faulty.EXPECTED)), "--seconds", "2")
    assert {case["mutation"]: case["outcome"] for case in found} == faulty.EXPECTED
    assert table(found) == [
        {"kind": "faulty", "cases": 10, "refused": 1, "right": 1, "wrong": 2, "crashed": 3, "hung": 1, "memory": 2}
    ]
