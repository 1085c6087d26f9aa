"""Triton's interpreter, mended where it differs from a GPU.

Triton 3.6 makes an int of an array of one number, which numpy refuses since 2.4. All cut fp32 off to bf16, which is
twice the error of rounding to the nearest, as a GPU does.
"""

import os

import numpy as np


def mend() -> None:
    """In a rehearsal, before the first kernel runs."""
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

    builder, cut = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, to):
        if (source.dtype.scalar, to.scalar) != (interpreter.tl.float32, interpreter.tl.bfloat16):
            return cut(self, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        to_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        nan = bits & 0x7FFFFFFF > 0x7F800000
        return interpreter.TensorHandle(np.where(nan, 0x7FC0, to_even).astype(np.uint16), to.scalar)

    builder.cast_impl = rounded
