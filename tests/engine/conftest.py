"""Fixtures of the engine tests."""

from __future__ import annotations

import pytest

from skimp.kernels import native


@pytest.fixture(params=["native", "plain"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.available():
        pytest.fail("the native kernels were not built; a C++ compiler is needed for this suite")
    return str(request.param)
