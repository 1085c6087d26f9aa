"""Sealed: a target is made beside itself, is taken up again after a kill, appears whole or not at all.

    .NAME.partial/lock          held by the process at work
    .NAME.partial/state.json    which command this is the work of (key), and how far its output counts
    .NAME.partial/out/          the output, ≥ what state.json says: the surplus is cut off when work is taken up
    .NAME.partial/old/          with overwrite, for the moment of the exchange: the older target

A SIGKILL at any instruction is safe: state.json is replaced whole and after the output that it counts; out/ becomes the
target by one rename; an old target that was set aside comes back when the folder is next opened. Only one process works
on a target: it holds the lock of the folder, which ends with the process.

    begin, of the same command and sources    go on from the state
    begin, of another                         begin again, and say so
    sealed is written down                    only the exchange is left, or, where out/ is gone, nothing
Cost      a save syncs what was written since the last one
Raises    UserError: the target exists, is something else, cannot be made, another process is at work on it, the disk is
          full, a source was changed while it was read
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import muonlm
from muonlm.errors import UserError
from muonlm.storage import (
    Growing,
    fingerprint,
    full_disk_told,
    is_full,
    locked,
    put_back,
    put_in_place,
    sync,
    write,
    write_atomically,
)

from ..sources.expand import Source, identity, licence
from .index import FORMAT_VERSION, checksum, is_ours, stored

SAVE_SECONDS = 5.0  # between saves: what a kill costs at most
Log = Callable[[str], None]


@contextlib.contextmanager
def sealed(to, *, overwrite: bool = False, wait: bool = False, log: Log | None = None) -> Iterator["Work"]:
    """`with sealed(to) as work:` call `work.begin`, write into `work.out`, `work.save` now and then, `work.complete`.

    An Exception discards the work unless `work.keep` is set or the disk is full; KeyboardInterrupt and SystemExit keep
    it once there is a state. wait: for another process at the same target. log: is told what is worth a line.
    """
    work = Work(Path(to).expanduser(), overwrite, log or (lambda line: None))
    with full_disk_told(work.given, work.remedy), contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(work.path / "lock", wait=wait))
        except BlockingIOError:
            raise UserError(
                f"another process is making {work.to} right now; wait for it, or choose another `to`"
            ) from None
        except OSError as error:
            if is_full(error):
                raise
            raise UserError(f"{work.path} cannot be made ({error.strerror}); choose another `to`") from None
        work.keep = work.begun  # until it is certain that this command may dispose of it
        with _discarding(work):
            put_back(work.to, aside=work.path / "old")
            yield work


@contextlib.contextmanager
def _discarding(work: "Work") -> Iterator[None]:
    discard = True
    try:
        yield
    except Exception as error:
        work.keep |= is_full(error)
        discard = not work.keep
        if isinstance(error, UserError) and work.keep and work.key and work.begun:
            raise UserError(f"{error}. What is done is kept: the same command goes on from there") from None
        raise
    except BaseException:
        discard = False
        raise
    finally:
        if discard or not work.begun:
            shutil.rmtree(work.path, ignore_errors=True)


class Work:
    """The work on one target, while the lock is held."""

    def __init__(self, to: Path, overwrite: bool, log: Log):
        self.given, self.to, self.path, self.overwrite, self.log = to, to.resolve(), partial_path(to), overwrite, log
        self.out = self.path / "out"
        self.keep = False  # also on an Exception
        self.key = self.sealed = ""
        self.state: dict = {}  # what `save` wrote down: how far this command is
        self.records: list[dict] = []  # of the sources, for the index
        self._stamps: dict[str, tuple[int, int]] = {}

    @property
    def begun(self) -> bool:
        return (self.path / "state.json").exists()

    def begin(self, files: list[Source], val_files: list[Source], settings: dict, *, keep: bool = False) -> dict | None:
        """Take up earlier work of the same settings and sources, else empty out/. The index, if it was finished.

        keep: also on an error, which is none of the data's (the network's, say).
        """
        self._stamps = _stamps(files + val_files)
        both = (("train", files), ("val", val_files))
        self.records = [source_record(s, split) for split, sources in both for s in sources]
        self.key = fingerprint([FORMAT_VERSION, muonlm.__version__, self.records, settings])
        before = self._read()
        ours = before if before.get("key") == self.key else {}
        if ours.get("sealed") and not self.out.exists():
            index = stored(self.to)
            if index and checksum(index) == ours["sealed"]:  # killed right after the rename
                self.log(f"{self.to} was finished when the command was stopped")
                self.keep = False
                return index
        refuse_target(self.to, self.overwrite)
        self.keep = keep
        if ours:
            self.state, self.sealed = ours["state"], ours["sealed"]
            return None
        if self.begun:
            self.log("what an earlier command left unfinished is of other settings or sources: beginning again")
        (self.path / "state.json").unlink(missing_ok=True)  # first: without it nothing else counts
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(exist_ok=True)
        return None

    def _read(self) -> dict:
        try:
            found = json.loads((self.path / "state.json").read_text("utf-8"))
            return {name: found[name] for name in ("key", "state", "sealed")}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def save(self, state: dict) -> None:
        """Write down how far the work is, whole or not at all. What the state counts must have been synced."""
        self.state = state
        found = {"key": self.key, "sealed": self.sealed, "state": state}
        write_atomically(self.path / "state.json", json.dumps(found))
        sync(self.path)

    def complete(self, make: Callable[[], dict], file: str, *, ascii: bool = True) -> dict:
        """Let `make` fill out/, unless that is done; write its index as `file`, and put out/ in the target's place."""
        if not self.sealed:
            index = make()
            for source, found in _stamps_again(self._stamps).items():
                if self._stamps[source] != found:
                    raise UserError(f"{source} was changed while it was read; run the command again")
            write(self.out / file, json.dumps(index, ensure_ascii=ascii, indent=1))
            self.sealed = checksum(index)
            self.save(self.state)
        put_in_place(self.out, self.to, aside=self.path / "old" if is_ours(self.to) else None)
        self.keep = False
        return stored(self.to)

    def remedy(self) -> str:
        kept = kept_work(self.given)
        goes_on = f": it goes on from {kept}; or remove that folder and" if kept else ", or"
        return (
            f"Make room and run the same command again{goes_on} choose another `to` (of prepared data that is kept "
            "in the cache: export MUONLM_CACHE=DIR)"
        )

    def spool_stdin(self, files: list[Source]) -> list[Source]:
        """Standard input is read several times: keep it beside the output until that is sealed."""
        if not any(s.name == "-" for s in files):
            return files
        spool = self.path / "stdin.txt"
        with Growing(spool) as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        if not spool.stat().st_size:
            raise UserError("-:1: standard input is empty; pipe some text: cat FILE | muonlm prep - --to FOLDER")
        return [replace(s, path=spool) if s.name == "-" else s for s in files]

    def header(self, layout: str) -> dict:
        """What every index begins with."""
        return {
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "muonlm": muonlm.__version__,
            "layout": layout,
        }


# -------------------------------------------------------------------------------------------------------- the sources


def is_file(source: Source) -> bool:
    return source.form not in ("hub", "problems")


def source_record(source: Source, split: str) -> dict:
    """What an index says of a source."""
    form, what, _ = identity(source)
    record = {"path": source.name, "split": split, "form": form}
    if is_file(source):
        return record | {"bytes": source.path.stat().st_size, "sha256": what}
    return record | {"identity": what, "licence": licence(source)}


def tell_licences(files: list[Source], log: Log | None) -> None:
    for line in dict.fromkeys(filter(None, map(licence, files))):
        if log:
            log(line)


def _stamps(files: list[Source]) -> dict[str, tuple[int, int]]:
    """File -> (bytes, time of the last change)."""
    return _stamps_again({str(s.path): (0, 0) for s in files if is_file(s)})


def _stamps_again(paths: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    found = {path: os.stat(path) for path in paths}
    return {path: (info.st_size, info.st_mtime_ns) for path, info in found.items()}


# --------------------------------------------------------------------------------------------------------- the target


def partial_path(to: Path) -> Path:
    to = to.resolve()  # a link: what it points at is replaced
    return to.parent / f".{to.name}.partial"


def kept_work(to) -> Path | None:
    """The folder of unfinished work on a target, if there is any that can be taken up."""
    path = partial_path(Path(to).expanduser())
    return path if (path / "state.json").exists() else None


def refuse_early(to, overwrite: bool) -> None:
    """Refuse a target before anything is looked at; where there is unfinished work, `begin` decides."""
    to = Path(to).expanduser()
    if not partial_path(to).exists():
        refuse_target(to, overwrite)


def refuse_target(to: Path, overwrite: bool) -> None:
    if os.path.ismount(to):
        raise UserError(f"{to} is a mount point, which cannot be replaced; choose a folder in it: `to` {to / 'data'}")
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{to} exists already; add `overwrite` to replace it, or choose another `to`")
    if not is_ours(to):
        raise UserError(f"{to} is not prepared data, so `overwrite` would delete something else; choose another `to`")
