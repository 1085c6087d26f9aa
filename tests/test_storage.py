"""Durable files: whole or absent, whatever stops the process, and one process at a time."""

import ast
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import muonlm
from muonlm import storage
from muonlm.errors import UserError

DURABLE = {"os": ("fsync", "replace", "rename"), "shutil": ("copy", "copyfile", "move"), "hashlib": ("file_digest",)}


def writes(code: str) -> list[int]:
    """Lines that open a file for writing, sync, rename, lock or hash one, by themselves."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import) and any(name.name in ("fcntl", "filelock") for name in node.names):
            found.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            if called.attr in (*DURABLE.get(owner, ()), "write_text", "write_bytes", "tofile"):
                found.append(node.lineno)
        mode = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        if isinstance(called, ast.Name) and called.id == "open" and str(mode)[2:3] in tuple("wax"):
            found.append(node.lineno)
    return found


def test_nothing_else_in_the_package_makes_files_durable():
    root = Path(muonlm.__file__).parent
    found = {
        str(p.relative_to(root)): writes(p.read_text("utf-8")) for p in root.rglob("*.py") if p.name != "storage.py"
    }
    assert not {file: lines for file, lines in found.items() if lines}
    assert len(writes((root / "storage.py").read_text("utf-8"))) >= 8  # the reader sees what there is to see


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_names_the_file(call, tmp_path, monkeypatch):
    file = tmp_path / "file"
    storage.write_atomically(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError) as caught:
            storage.write_atomically(file, "new")
    assert caught.value.filename == str(file) and file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    storage.write_atomically(file, b"new\n")
    assert file.read_bytes() == b"new\n"


def test_a_file_that_grows_is_cut_back_to_what_counts(tmp_path):
    with storage.Growing(tmp_path / "f") as file:
        file.write(b"counted, lost")
    with storage.Growing(tmp_path / "f", keep=7) as file:
        assert file.size == 7
        file.write(b"!")
        file.overwrite_start(b"C")
        assert file.size == 8
    assert (tmp_path / "f").read_bytes() == b"Counted!"


def test_a_folder_aside_replaces_the_old_one_or_leaves_it(tmp_path, monkeypatch):
    to = tmp_path / "to"
    for content in ("first", "second"):
        with storage.folder_aside(to) as work:
            storage.write(work / content, content)
    assert os.listdir(to) == ["second"] and os.listdir(tmp_path) == ["to"]
    with pytest.raises(KeyError), storage.folder_aside(to) as work:
        storage.write(work / "third", "third")
        raise KeyError
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError), storage.folder_aside(to) as work:
            pass
    assert os.listdir(to) == ["second"] and os.listdir(tmp_path) == ["to"]


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    for name in ("new", "to"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(UserError, match="to was made by another process meanwhile"):
        storage.put_in_place(tmp_path / "new", tmp_path / "to")
    assert (tmp_path / "to" / "file").read_text() == "to"


HOLD = """
import sys, time
from pathlib import Path
import muonlm
from muonlm import storage
folder = Path(sys.argv[1])
with storage.locked(folder / "lock", wait=True):
    log = open(folder.parent / "log", "a")
    log.write("in\\n"); log.flush()
    time.sleep(float(sys.argv[2]))
    (folder / "lock").unlink()  # as whoever removes the folder does
    log.write("out\\n"); log.flush()
"""


def hold(folder: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)])


def lines(folder: Path) -> list[str]:
    log = folder.parent / "log"
    return log.read_text().split() if log.exists() else []


def wait_for(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    holder = hold(folder, 60)
    wait_for(lambda: lines(folder) == ["in"])
    with pytest.raises(BlockingIOError), storage.locked(folder / "lock"):
        pass
    waiting = hold(folder, 0)
    time.sleep(0.3)
    assert lines(folder) == ["in"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert waiting.wait(30) == 0 and lines(folder) == ["in", "in", "out"]


def test_those_who_wait_for_a_lock_whose_file_is_removed_come_in_one_by_one(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for process in [hold(folder, 0.1) for _ in range(4)]:
        assert process.wait(60) == 0
    assert lines(folder) == ["in", "out"] * 4


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_is_used_without(code, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    plain = fcntl.flock

    def flock(handle, operation):
        if operation & fcntl.LOCK_EX:
            raise OSError(code, "no locks here")
        plain(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    inside = False
    if code == errno.EIO:
        with pytest.raises(OSError, match="no locks here"), storage.locked(tmp_path / "lock"):
            inside = True
    else:
        with storage.locked(tmp_path / "lock"):
            inside = True
    assert inside == (code != errno.EIO)


def test_a_full_disk_is_told_with_the_place_and_the_remedy_and_other_errors_stay(tmp_path):
    to = tmp_path / "not" / "there"
    for code in storage.FULL:
        with pytest.raises(UserError, match=r"there could not be written: the disk is full \([\d,]+ MiB free\)\. Go"):
            with storage.full_disk_told(to, lambda: "Go elsewhere."):
                raise OSError(code, os.strerror(code))
    with pytest.raises(PermissionError), storage.full_disk_told(to, lambda: ""):
        raise PermissionError(errno.EACCES, "no")
    wrapped = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert storage.is_full(wrapped) and not storage.is_full(ValueError("28"))
    assert "no (" in str(storage.not_written(to, PermissionError(errno.EACCES, "no"), ""))
