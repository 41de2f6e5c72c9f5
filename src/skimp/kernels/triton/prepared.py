"""What launches need of a layer's parameters, worked out once and kept as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

Params = TypeVar("Params")
Made = TypeVar("Made")


class Prepared(Generic[Params, Made]):
    """``make(params)``, called once for each; told apart by identity, as tensors do not compare."""

    def __init__(self, make: Callable[[Params], Made]) -> None:
        self._make = make
        self._made: dict[int, Made] = {}

    def __call__(self, params: Params) -> Made:
        made = self._made.get(id(params))
        if made is None:
            made = self._made[id(params)] = self._make(params)
            weakref.finalize(params, self._made.pop, id(params), None)
        return made
