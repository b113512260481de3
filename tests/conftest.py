"""Strict JAX flags for every test, compiled programs kept on disk for the next run, tiny models that tests share."""

import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from absl import app, flags
from hypothesis import HealthCheck, settings

from ramp_jax import data
from ramp_jax.cli.running import keep_small
from ramp_jax.models import load_model

LAUNCH = Path(__file__).parent.parent / "launch"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
COMPILED, MOST_COMPILED = Path(__file__).parent.parent / ".jax_cache", 1 << 30
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


# A busy machine is no fault of what is tested: neither compiling nor drawing examples has to be fast.
settings.register_profile("busy", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure(config):
    """A warning of our modules, or of what they call in the wrong way, is an error."""
    config.addinivalue_line("filterwarnings", r"error:::ramp_jax(\..*)?")
    if not hasattr(config, "workerinput"):
        keep_small(COMPILED, MOST_COMPILED)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Unload a module's programs after it: each holds memory maps, of which Linux lets a process have 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_quickly():
    """Programs of a module compiled quickly rather than well: most of its time would go into compiling them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def untied_directory(tmp_path_factory):
    return tiny.save_hf(tmp_path_factory.mktemp("hf") / "tiny-untied", tied=False)


@pytest.fixture(scope="session")
def tied_directory(tmp_path_factory):
    return tiny.save_hf(tmp_path_factory.mktemp("hf") / "tiny-tied", tied=True)


@pytest.fixture(scope="session")
def untied(untied_directory):
    """Random Llama with a head of its own, f32; do not modify."""
    return load_model(str(untied_directory))


@pytest.fixture(scope="session")
def tied(tied_directory):
    """Random Llama whose embedding is its head, f32; do not modify."""
    return load_model(str(tied_directory))


ODD = {
    "what down reads": {"tied": False, "d_ff": 80},
    "the stream": {"tied": False, "d_model": 80},
}
"""Whose width is no multiple of 32, so that no block holds the rows of the matrices that read it."""


@pytest.fixture(scope="session", params=ODD)
def odd(request, tmp_path_factory):
    """Random Llama with matrices that cannot be quantized, f32; do not modify."""
    return load_model(str(tiny.save(tiny.hf_model(**ODD[request.param]), tmp_path_factory.mktemp("hf") / "odd")))


@pytest.fixture(scope="session", params=["untied", "tied"])
def model(request):
    """Both tiny models, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def windows(untied):
    """Three windows of 24 real tokens; both tiny models share the tokenizer."""
    return data.windows("builtin", untied.tokenizer, context=24, count=3)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script in this process with flags of its own: (name, *arguments) → exit code, stdout, stderr."""

    def run(name, *arguments):
        app.define_help_flags()
        known = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            with jax.numpy_dtype_promotion("standard"), pytest.raises(SystemExit) as ended:
                runpy.run_path(str(LAUNCH / f"{name}.py"), run_name="__main__")
        finally:
            for flag in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def fails(call):
    """Run a script that must end with exit code 1 and exactly one line, which it returns."""

    def run(name, *arguments):
        code, _, errors = call(name, *arguments)
        assert code == 1
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, errors
        assert "Traceback" not in errors
        return lines[0]

    return run
