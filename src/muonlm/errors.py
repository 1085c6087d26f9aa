"""What can go wrong, as the caller is told: the command line turns each into a message and an exit code."""


class UserError(ValueError):
    """A mistake in what the user gave us. The text says what was wrong, what was found and what to type instead."""


class RunFailed(RuntimeError):
    """The run cannot go on; the text says why and what to change."""
