"""Files under their final names are whole whatever happens, and folders belong to one process."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from ramp_jax import files
from ramp_jax.files import alone_in, read_rows, replacing, rows_to, write_bytes

LEFT = "file.0123456789abcdef.partial"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(TypeError):
        write_bytes(path, "text is not bytes")
    assert path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_bytes(tmp_path / "folder", b"content")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_folder_is_made_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "folder"
    with pytest.raises(IsADirectoryError), replacing(path, folder=True) as temporary:
        (temporary / "part" / "of").mkdir(parents=True) or temporary.read_bytes()
    assert names(path.parent) == []
    with replacing(path, folder=True) as temporary:
        (temporary / "part").write_text("one")
        assert not path.exists()
    assert [*path.parent.rglob("*")] == [path, path / "part"]


def test_several_files_take_their_names_when_all_are_whole(tmp_path, monkeypatch):
    """The first one last; none where the body raises."""
    paths, named, replace = [tmp_path / name for name in "abc"], [], os.replace
    with pytest.raises(TypeError), files.replacing_all(paths) as begun:
        begun[1].write_text(b"no text")
    assert names(tmp_path) == []
    monkeypatch.setattr(os, "replace", lambda old, new: (named.append(Path(new)), replace(old, new)))
    with files.replacing_all(paths) as begun:
        for part, path in zip(begun, paths, strict=True):
            part.write_text(path.name)
        assert names(tmp_path) == sorted(part.name for part in begun)
    assert named == paths[::-1]
    assert [path.read_text() for path in paths] == ["a", "b", "c"]


def test_two_writers_of_one_file_never_tear_it(tmp_path):
    path, contents = tmp_path / "file", [bytes([i]) * 100_000 for i in (1, 2)]

    def write(content):
        for _ in range(100):
            write_bytes(path, content)

    write_bytes(path, contents[0])
    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    read = set()
    while any(writer.is_alive() for writer in writers):
        read.add(path.read_bytes())
    assert read <= set(contents)
    assert names(tmp_path) == ["file"]


def test_what_the_dead_left_is_removed_and_what_the_living_write_is_not(tmp_path):
    """A lock is what tells them apart: it ends with its process, whatever that was called and wherever it ran."""
    others = ["file.partial", "other.0123456789abcdef.partial", "notes.txt"]
    for name in (LEFT, *others):
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "file") as alive:
        write_bytes(tmp_path / "file", b"whole")
        assert names(tmp_path) == sorted([*others, alive.name, "file"])
        alive.write_text("later")
    assert (tmp_path / "file").read_text() == "later"
    (tmp_path / LEFT).mkdir()
    (tmp_path / LEFT / "part").write_text("half")
    with alone_in(tmp_path):
        assert names(tmp_path) == ["file", "file.partial", "lock", "notes.txt"]


def test_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    done = []

    def seen(name):
        call = getattr(os, name)

        def recorded(*arguments):
            target = arguments[0] if name == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
            done.append((name, Path(target).suffix))
            return call(*arguments)

        monkeypatch.setattr(os, name, recorded)

    seen("fsync")
    seen("replace")
    write_bytes(tmp_path / "file", b"content")
    assert done == [("fsync", ".partial"), ("replace", ".partial"), ("fsync", "")]


def raising(error):
    raise error


FULL = {
    "the system": lambda path: Path("/dev/full").write_bytes(b"x"),
    "a quota": lambda path: raising(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
    "numpy": lambda path: np.zeros(1 << 16).tofile("/dev/full"),
    "safetensors": lambda path: raising(SafetensorError("I/O error: No space left on device (os error 28)")),
}


@pytest.mark.parametrize("who", FULL)
def test_a_full_disk_in_one_sentence(tmp_path, who):
    """Whoever notices: which file, what was needed, what there is; and the old file stays."""
    path, why = tmp_path / "file", "Disk quota exceeded" if who == "a quota" else "No space left on device"
    write_bytes(path, b"old")
    sentence = rf"cannot write .*/file \({why}\): it needs %s bytes, and [\d,]+ are free; free some space there"
    with pytest.raises(OSError, match=sentence % "1,234"), replacing(path, 1234):
        FULL[who](path)
    with pytest.raises(OSError, match=sentence % "more than 5"), replacing(path) as temporary:
        FULL[who](temporary.write_bytes(b"12345"))
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*file \(No such file or directory\); choose another output"):
        write_bytes(tmp_path / "nowhere" / "file", b"")


def test_a_folder_belongs_to_one_process_which_says_who_it_is(tmp_path):
    with alone_in(tmp_path):
        who = rf"process {os.getpid()} on .+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        with pytest.raises(OSError, match=rf"another run works on .* \({who}\); wait for its end"), alone_in(tmp_path):
            pass
    with alone_in(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_lock_that_was_removed_while_waited_for_is_none(tmp_path, monkeypatch):
    """The file that its owner removed at its end may still be locked by the one that came second, which looks again."""
    lock, locked = tmp_path / "lock", files._locked

    def removed_first(descriptor, **how):
        monkeypatch.setattr(files, "_locked", locked)
        lock.unlink()
        return locked(descriptor, **how)

    monkeypatch.setattr(files, "_locked", removed_first)
    with alone_in(tmp_path):
        assert str(os.getpid()) in lock.read_text()


def test_rows_of_a_run_that_went_back(tmp_path):
    """One that goes on from an earlier checkpoint repeats rows, which take the place of what came after it."""
    path = tmp_path / "metrics.jsonl"
    for rows in ([(1, "a"), (2, "b"), (3, "c")], [(2, "d")]):
        add = rows_to(path, "step")
        for step, x in rows:
            add({"step": step, "x": x})
    assert read_rows(path) == [{"step": 1, "x": "a"}, {"step": 2, "x": "d"}]
    path.write_text('{"step": 1}\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not hold one JSON object per line"):
        read_rows(path)
