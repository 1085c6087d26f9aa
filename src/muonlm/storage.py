"""Durable files: whole or absent, on the disk when we say so, written by one process at a time.

Only this module opens files for writing, syncs, renames, hashes or locks them.

    write_atomically, replacing   a file gets its new content by one rename
    folder_aside                  a folder is filled beside its place, synced, and put there by one rename
    put_in_place                  that last step alone; an older folder steps aside, and comes back if the step fails
    put_back                      the same for a step that a kill cut short
    write                         a file inside such a folder
    Growing                       a file that is appended to; taken up again, it is cut back to the bytes that count
    locked                        one process at a time, until it leaves or ends in whatever way

A SIGKILL at any instruction leaves the old content or the new one. What it may leave beside them has a name that begins
with a dot.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

from muonlm.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # said by file systems without locks


# ----------------------------------------------------------------------------------------------------------- one file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as work:` write the file `work`; it is then synced and renamed to `path`."""
    path = Path(path)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield work
        sync(work)
        os.replace(work, path)
    except OSError as error:
        error.filename = str(path)  # a failed write does not say of which file
        raise
    finally:
        work.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Readers and kills see the old content or the new one."""
    with replacing(path) as work:
        _fill(work, content)


def write(path: Path, content: str | bytes) -> None:
    """A new file, synced. For files in a folder that is put in place later: a kill may leave it half written."""
    _fill(path, content)
    sync(path)


def append_line(path: Path, line: str) -> None:
    """A line more, handed to the system and not waited for: a power cut may take the last lines, a kill does not."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        error.filename = str(path)
        raise


class Growing:
    """A binary file that is appended to. `keep`: the bytes of it that count, the rest is cut off; None: a new file."""

    def __init__(self, path: Path, keep: int | None = None):
        self._file = open(path, "wb" if keep is None else "r+b")
        self.size = keep or 0
        if keep is not None:
            self._file.truncate(keep)
            self._file.seek(0, os.SEEK_END)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)

    def overwrite_start(self, data: bytes) -> None:
        self._file.seek(0)
        self._file.write(data)
        self._file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    def abandon(self) -> None:
        """Close, in whatever state; nothing if it is closed."""
        with contextlib.suppress(OSError):  # closing flushes: a full disk says so a second time
            self._file.close()

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.abandon() if kind else self.close()


def sync(path: Path) -> None:
    """A file's content, or the names in a folder, are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fill(path: Path, content: str | bytes) -> None:
    with open(path, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


# ----------------------------------------------------------------------------------------------------------- a folder


@contextlib.contextmanager
def folder_aside(to: Path) -> Iterator[Path]:
    """`with folder_aside(to) as work:` fill the folder `work`; it then becomes `to`, in place of an older one."""
    work = to.with_name(f".{to.name}-{os.getpid()}")
    old = work.with_name(f"{work.name}.old")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        put_in_place(work, to, aside=old)
    finally:
        for folder in (work, old):
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(new: Path, to: Path, *, aside: Path | None = None) -> None:
    """Sync the folder `new` and rename it to `to`, which is absent or empty, or steps aside to `aside`."""
    for file in new.rglob("*"):
        sync(file)
    sync(new)
    old = aside if to.exists() else None
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(to, old)
    try:
        os.replace(new, to)
    except BaseException as error:
        if old is not None:
            put_back(to, aside=old)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{to} was made by another process meanwhile; choose another place") from None
        raise
    sync(to.parent)  # the rename itself


def put_back(to: Path, *, aside: Path) -> None:
    """What `put_in_place` set aside comes back, if a kill came before the new folder had its place."""
    if aside.exists() and not to.exists():
        os.rename(aside, to)


# ------------------------------------------------------------------------------------------------------------ locking


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """One process at a time is inside; the file `path` and its folder are made if need be. It ends with its process.

    Whoever is inside may remove the file: those who waited for it then wait for a new one of that name. On file systems
    without locks all are let in.

    Raises   BlockingIOError: another process is inside, and `wait` is not set
    """
    from filelock import FileLock, Timeout  # 60 ms, which commands that lock nothing need not wait for

    # A mere marker in place of a lock would outlive a killed process. (filelock before 3.25 has none to fall back to.)
    never = {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock.__init__).parameters else {}
    lock = FileLock(path, timeout=-1 if wait else 0, **never)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from None
    except NotImplementedError:  # as filelock before 3.25 tells of a file system without locks
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------------------- hashes


def digest(path: Path, algorithm: str | Callable = "blake2b") -> str:
    """The hash of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def canonical(value) -> bytes:
    """The bytes that hashes of JSON values are taken over: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def fingerprint(value) -> str:
    """The SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


# --------------------------------------------------------------------------------------------------- places and space


def cache_home(cache=None) -> Path:
    """Where what can be made again is kept: `cache`, else $MUONLM_CACHE, else ~/.cache/muonlm."""
    return Path(cache or os.environ.get("MUONLM_CACHE") or Path.home() / ".cache" / "muonlm")


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full."""
    wrapped = f"os error {errno.ENOSPC}" in str(error)  # safetensors gives the system's errors as text
    return wrapped or isinstance(error, OSError) and error.errno in FULL


def not_written(path: Path, error: BaseException, remedy: str) -> UserError:
    """What a failed write is told as: the file or folder, why, how much space there is, and what to do."""
    there = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free / 2**20
    why = "the disk is full" if is_full(error) else getattr(error, "strerror", None) or error
    return UserError(f"{path} could not be written: {why} ({free:,.0f} MiB free). {remedy}")


@contextlib.contextmanager
def full_disk_told(path: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """A full disk becomes a UserError about `path`; any other error stays what it is."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise not_written(path, error, remedy()) from None
