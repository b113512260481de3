"""What all scripts share: how they are stopped, and what their logs say."""

import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ramp_jax import cli, files, progress
from ramp_jax.cli.running import keep_small

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a function as a script without flags; returns its exit code and what it said."""

    def script(main):
        monkeypatch.setattr(sys, "argv", ["script.py"])
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        return ended.value.code, capsys.readouterr().err

    return script


@pytest.fixture
def interruptible():
    """SIGINT as Python has it, also where the tests run behind the shell's &, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("asked", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_that_is_stopped_leaves_nothing_and_says_how_to_go_on(run, tmp_path, asked, code):
    def main():
        with files.replacing(tmp_path / "out") as temporary:
            temporary.write_text("half")
            signal.raise_signal(asked)

    before = signal.getsignal(asked)
    said = f"stopped by {asked.name}; run the same command again to go on."
    assert run(main) == (code, f"{said}\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(asked) is before


def test_a_second_signal_is_not_waited_for(run):
    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            assert {signal.getsignal(asked) for asked in (signal.SIGTERM, signal.SIGINT)} == {signal.SIG_DFL}
            raise

    assert run(main)[0] == 143


def test_a_signal_that_the_shell_ignores_stays_ignored(run, monkeypatch):
    def main():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("went on")

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(main) == (1, "error: went on\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_line_says_what_a_log_is_about(capsys):
    cli.announce("auto", seed=3)
    line = r"ramp_jax [\d.]+, jax [\d.]+, \d+ x \w+, (bfloat16|float32), seed 3\n"
    assert re.fullmatch(line, capsys.readouterr().out)


class Terminal:
    """Standard error that is a terminal or not."""

    def __init__(self, terminal):
        self.text, self.isatty = "", lambda: terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def said(monkeypatch):
    """What progress over work that takes so many seconds each looks like: (seconds, terminal) → text."""

    def track(seconds, terminal=False):
        stream, clock = Terminal(terminal), [0.0]
        monkeypatch.setattr(sys, "stderr", stream)
        with monkeypatch.context() as patched:
            patched.setattr(progress.time, "monotonic", lambda: clock[0])
            patched.setattr(progress.time, "time", lambda: clock[0])
            patched.setattr(progress.time, "localtime", progress.time.gmtime)
            patched.setattr(progress, "_WORTH_SAYING", 0.0 if terminal else progress._WORTH_SAYING)
            for took in progress.track(seconds, "working", "block"):
                clock[0] += took
        return stream.text

    return track


def test_a_log_has_a_line_at_the_end_and_one_per_minute(said):
    assert said([0.3, 0.3]) == ""
    assert said([20.0, 20.0]) == "working: all 2 in 40 s\n"
    lines = [
        "working: 3 of 7 after 75 s, ends about 00:02",
        "working: 6 of 7 after 150 s, ends about 00:02",
        "working: all 7 in 175 s",
    ]
    assert said([25.0] * 7).splitlines() == lines
    assert said([30.0] * 2) == "working: all 2 in 60 s\n"
    assert said(x for x in (61.0, 1.0)).splitlines() == ["working: 1 after 61 s", "working: all 2 in 62 s"]


def test_a_bar_is_for_terminals_that_want_it(said, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\r" in said([0.0] * 3, terminal=True)
    for name, value in {"NO_COLOR": "1", "TERM": "dumb"}.items():
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert "\r" not in said([20.0] * 3, terminal=True)


def test_installed_commands_are_the_scripts():
    """`ramp-export --help` says what `python launch/export_gguf.py --help` says, and takes no offence at `head`."""
    commands = {
        point.name: point for point in metadata.entry_points(group="console_scripts", module="ramp_jax.cli.commands")
    }
    assert {"ramp-train", "ramp-allocate", "ramp-export", "ramp-evaluate"} == commands.keys()
    assert all(callable(point.load()) for point in commands.values())
    script, command = ROOT / "launch/export_gguf.py", Path(sys.executable).with_name("ramp-export")
    said = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    piped = f"set -o pipefail; {shlex.quote(str(command))} --help | head -1"
    early = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=True)
    assert "--allocation=..." in said
    assert (early.stdout.strip(), early.stderr) == (said.splitlines()[0], "")


def test_compiled_programs_are_kept_small(tmp_path):
    """Nothing goes while they are few; then what was used last before all others, until half of what is allowed is
    left. What is not a program stays, and nothing of it is an error."""
    for age in range(10):
        program = tmp_path / f"{(7 * age) % 10}-cache"
        program.write_bytes(b"x" * 100)
        program.with_name(f"{(7 * age) % 10}-atime").touch()
        os.utime(program, (10 - age, 0))
    (tmp_path / "autotuned").mkdir()
    keep_small(tmp_path, 1000)
    assert len(list(tmp_path.iterdir())) == 21
    keep_small(tmp_path, 900)
    kept = {f"{(7 * age) % 10}-{kind}" for age in range(4) for kind in ("cache", "atime")}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"autotuned"}
    keep_small(tmp_path / "none", 900)
