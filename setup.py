"""Builds the optional native kernels; without a C++ compiler the package installs without them."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup

SRC = Path("src/skimp/kernels/native/src")

if os.environ.get("SKIMP_NO_NATIVE") or platform.system() == "Windows":
    extensions = []
else:
    extensions = [
        Extension(
            "skimp.kernels.native._native",
            sources=sorted(str(p) for p in SRC.glob("*.cpp")),
            depends=sorted(str(p) for p in SRC.glob("*.h")),
            include_dirs=[str(SRC)],
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-ffp-contract=off",  # code says where: bits must not depend on the compiler
                "-fvisibility=hidden",
                "-pthread",
                "-Wno-psabi",
            ],
            extra_link_args=["-pthread"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ]

setup(ext_modules=extensions, options={"bdist_wheel": {"py_limited_api": "cp311"}})
