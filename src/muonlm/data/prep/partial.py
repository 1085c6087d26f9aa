"""Unfinished folders: a target is made beside itself, is taken up again after a kill, appears whole or not at all.

    .NAME.partial/lock          held by the process at work
    .NAME.partial/state.json    which command this is the work of (key), and how far its output counts
    .NAME.partial/out/          the output, ≥ what state.json says: the surplus is cut off when work is taken up
    .NAME.partial/old/          with overwrite, for the moment of the exchange: the older target

A SIGKILL at any instruction is safe: state.json is replaced whole and after the output that it counts; out/ becomes the
target by one rename; an old target that was set aside comes back when the folder is next opened. Only one process works
on a target: it holds the lock of the folder, which ends with the process.

    open, of the same key       go on from state.json
    open, of another key        begin again
    "sealed" in the state       only the exchange is left, or, where out/ is gone, nothing
Cost      a save syncs what was written since the last one
Raises    UserError: the target exists, is something else, cannot be made, or another process is at work on it
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from muonlm import storage
from muonlm.errors import UserError

from .index import is_ours


class Partial:
    """The work on one target. `with Partial(to, wait=…) as work:` holds the lock; an Exception discards the folder
    unless `keep` is set, KeyboardInterrupt and SystemExit keep it once there is a state."""

    def __init__(self, to: Path, *, wait: bool = False):
        self.to, self.path, self.wait = to.resolve(), partial_path(to), wait
        self.out = self.path / "out"
        self.keep = False  # also on an Exception

    def __enter__(self) -> "Partial":
        make_folder(self.to.parent)
        make_folder(self.path)
        self._lock = contextlib.ExitStack()
        try:
            self._lock.enter_context(storage.locked(self.path / "lock", wait=self.wait))
        except BlockingIOError:
            raise UserError(
                f"another process is making {self.to} right now; wait for it, or choose another --to"
            ) from None
        old = self.path / "old"
        if old.exists() and not self.to.exists():  # killed in the middle of an exchange
            os.rename(old, self.to)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None or not self.begun or (issubclass(kind, Exception) and not self.keep):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def peek(self, key: str) -> dict | None:
        """The state of earlier work of this key."""
        try:
            state = json.loads((self.path / "state.json").read_text("utf-8"))
            return state if state["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load(self, key: str) -> dict | None:
        """The same; without any, out/ is emptied."""
        if state := self.peek(key):
            return state
        (self.path / "state.json").unlink(missing_ok=True)  # first: without it nothing else counts
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(exist_ok=True)
        return None

    @property
    def begun(self) -> bool:
        return (self.path / "state.json").exists()

    def save(self, state: dict) -> None:
        """Whole or not at all. What the state counts must have been synced."""
        storage.write_atomically(self.path / "state.json", json.dumps(state))
        storage.sync(self.path)

    def put_in_place(self) -> None:
        """out/ becomes the target; an older one of ours goes."""
        storage.put_in_place(self.out, self.to, aside=self.path / "old" if is_ours(self.to) else None)


def partial_path(to: Path) -> Path:
    to = to.resolve()  # a link: what it points at is replaced
    return to.parent / f".{to.name}.partial"


def kept_work(to) -> Path | None:
    """The folder of unfinished work on a target, if there is any that can be taken up."""
    path = partial_path(Path(to).expanduser())
    return path if (path / "state.json").exists() else None


def refuse_target(to: Path, overwrite: bool) -> None:
    if os.path.ismount(to):
        raise UserError(f"{to} is a mount point, which cannot be replaced; choose a folder in it: --to {to / 'data'}")
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{to} exists already; add --overwrite to replace it, or choose another --to")
    if not is_ours(to):
        raise UserError(f"{to} is not prepared data, so --overwrite would delete something else; choose another --to")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if storage.is_full(error):
            raise
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --to") from None
