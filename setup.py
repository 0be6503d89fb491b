"""The compiled part of the package; everything else is in pyproject.toml. Without a C compiler it is left out."""

import sys

from setuptools import Extension, setup

LOOPS = ["-fno-tree-loop-distribute-patterns"]
KERNEL = Extension(
    "shardwise.comm._shm",
    ["shardwise/comm/shm_kernel.c", "shardwise/comm/shm_module.c", "shardwise/comm/codec_kernel.c"],
    depends=["shardwise/comm/kernel.h"],
    # Without the two of floating point gcc fuses a product and a sum, which changes bits, and branches for every value.
    extra_compile_args=["-O3", "-fwrapv", "-ffp-contract=off", "-fno-trapping-math", *LOOPS, "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(ext_modules=[KERNEL] if sys.platform == "linux" else [])
