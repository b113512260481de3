"""Run cases by hand, or for the suite `fuzz` and the tests: a JSON object per case goes to standard output."""

import argparse
import collections
import json
import os
import sys

from mutations.runner import GOOD, SECONDS, run


def main() -> None:
    """Print what became of every case, and how many ended how."""
    parser = argparse.ArgumentParser(prog="python -m mutations", description=__doc__)
    parser.add_argument("--kinds", default="", help="of which kinds; default: all")
    parser.add_argument("--cases", type=int, default=200, help="how many, over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="other cases under another number")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which a case hangs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--verbose", action="store_true", help="show what is neither refused nor right, for people")
    options = parser.parse_args()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for case in run(
        list(filter(None, options.kinds.split(","))), options.cases, options.seed, options.workers, options.seconds
    ):
        counts[case.kind, case.outcome] += 1
        if not options.verbose:
            print(json.dumps(case._asdict()), flush=True)
        elif case.outcome not in GOOD:
            print(f"{case.outcome:8} {case.kind} {case.mutation!r} {case.number}: {case.what}\n         {case.detail}")
    if options.verbose:
        for (kind, outcome), count in sorted(counts.items()):
            print(f"{kind:12} {outcome:8} {count}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
