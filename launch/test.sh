#!/usr/bin/env bash
# Lint and test the project in its own environment: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
echo "Installing (the first time compiles llama.cpp, about 5 minutes on two cores)"
python -m pip install --quiet --editable '.[test,verify]'
install_model
ruff check .
ruff format --check .
pyrefly check --config .pyrefly.toml
pyrefly check --config .pyrefly.toml --only=unknown-name launch/*.py launch/benchmarks/*.py
# Without a restart, since a restarted worker of `loadfile` can wait for ever (pytest-dev/pytest-xdist#784).
# Failures are printed as they happen, so that the log of a run that is stopped shows them.
python -m pytest -q -n 2 --dist loadfile --max-worker-restart=0 --instafail --tb=short --durations=25 "$@"
