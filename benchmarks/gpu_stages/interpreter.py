"""Triton's interpreter and numpy: Triton 3.6 makes an int of an array of one number, which numpy refuses since 2.4."""

import os


def mend() -> None:
    """In a rehearsal, before the first kernel runs: a loop's bound is read as a number, as later Tritons read it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
