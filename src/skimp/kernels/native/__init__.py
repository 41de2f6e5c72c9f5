"""Native CPU kernels: a forward is captured once as a program and replayed in one call.

``src/`` holds the C++; ``op.h`` there is the contract. The kernels are optional: where the
extension was not built, everything here still imports and ``available()`` is False.
"""

from skimp.kernels.native.library import (
    advise_huge,
    available,
    default_threads,
    describe,
    get_threads,
    instruction_set,
    set_threads,
)
from skimp.kernels.native.matrix import PackedMatrix, PackedStack
from skimp.kernels.native.program import NativeOps, Program, lacks

__all__ = [
    "NativeOps",
    "PackedMatrix",
    "PackedStack",
    "Program",
    "advise_huge",
    "available",
    "default_threads",
    "describe",
    "get_threads",
    "instruction_set",
    "lacks",
    "set_threads",
]
