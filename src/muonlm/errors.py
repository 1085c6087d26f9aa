"""What can go wrong, as the caller is told: the command line turns each into a message and an exit code."""


class UserError(ValueError):
    """A mistake in what the user gave us. The text says what was wrong, what was found and what to type instead."""


class RunFailed(RuntimeError):
    """The run cannot go on; the text says why and what to change."""


def out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's MemoryError, torch's OutOfMemoryError (CUDA), or what torch says of a CPU's memory."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)
