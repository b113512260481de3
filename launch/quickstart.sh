#!/usr/bin/env bash
# The whole way on a real language model, SmolLM2-135M-Instruct: train a policy, allocate, export, compare, report.
#
#   bash launch/quickstart.sh
#
# BUDGET (bytes of the finished file, default 92000000) and WORKDIR may be set. What exists already is used again.
# Files are encoded with --encoder=best; the default of launch/allocate.py, compensated, loses less and takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
BUDGET="${BUDGET:-92000000}"
WORKDIR="${WORKDIR:-runs/smollm2-135m}"
ALLOCATION="$WORKDIR/allocation-$BUDGET.json"
GGUF="$WORKDIR/SmolLM2-135M-Instruct-RAMP_$BUDGET.gguf"

echo "== Installing"
python -m pip install --quiet --editable .
install_model
if python -c 'import llama_cpp' 2>/dev/null; then
  :
elif ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
  echo "No C++ compiler was found: going on without llama.cpp, so its row and column will be missing."
else
  echo "Compiling llama.cpp (about 5 minutes on two cores)"
  python -m pip install --quiet --editable '.[verify]' ||
    echo "llama.cpp did not compile: going on without it, so its row and column will be missing."
fi

started=$SECONDS
echo "== Training a policy"
python launch/train.py --config=configs/smollm2_135m.py --workdir="$WORKDIR"
echo "== Allocating $BUDGET bytes"
[ -f "$ALLOCATION" ] || python launch/allocate.py --model=smollm2-135m --source_policy="$WORKDIR" \
  --budget_bytes="$BUDGET" --encoder=best --output="$ALLOCATION"
echo "== Exporting"
[ -f "$GGUF" ] || python launch/export_gguf.py --model=smollm2-135m --allocation="$ALLOCATION" --output="$GGUF"
echo "== Comparing on held-out text"
python launch/compare.py --workdir="$WORKDIR" --allocation="$ALLOCATION" --gguf="$GGUF" --count=4
echo "== Report"
python launch/report.py --workdir="$WORKDIR" --allocation="$ALLOCATION" --gguf="$GGUF"
echo "GGUF: $GGUF"
echo "After installation: $((SECONDS - started)) seconds"
