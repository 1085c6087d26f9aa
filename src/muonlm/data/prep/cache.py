"""The cache of prepared folders: each is made once, whichever process, rank or run comes first."""

import shutil
from collections.abc import Callable
from pathlib import Path

from muonlm.errors import UserError
from muonlm.storage import cache_home, fingerprint


def in_cache(kind: str, key: dict, read: Callable[[Path], object], make: Callable[[Path], None], cache=None) -> Path:
    """The folder of `key` in the cache, made by `make(folder)` if it is absent or `read(folder)` refuses it."""
    home = cache_home(cache)
    to = home / kind / fingerprint(key)[:20]
    if to.exists():
        try:
            read(to)
            return to
        except UserError:
            shutil.rmtree(to, ignore_errors=True)  # ours, damaged: a cache may be made anew
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        make(to)
    except (UserError, OSError) as error:
        if to.exists():  # another process was first: its folder stands where ours was to go
            read(to)
            return to
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"prepared {'text is' if kind == 'data' else 'examples are'} kept in {home}, which cannot be written "
            f"({error.strerror}); name another place: export MUONLM_CACHE=/tmp/muonlm"
        ) from None
    return to


def by_one_rank(make: Callable[[], Path], dist) -> Path:
    """`make()` on rank 0, then on the others, who find what it made; its refusal is everybody's.

    dist: with `main` (this is rank 0) and `broadcast(value)` (rank 0's value).
    """
    folder, refusal = None, ""
    if dist.main:
        try:
            folder = make()
        except UserError as error:
            refusal = str(error)
    if refusal := dist.broadcast(refusal):  # else the others would fail at a wait for rank 0, and hide why
        raise UserError(refusal)
    return folder or make()  # each machine may have a cache of its own
