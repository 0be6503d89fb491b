"""The compiled part of the package; everything else is in pyproject.toml. Without a C compiler it is left out."""

import sys

from setuptools import Extension, setup

KERNEL = Extension(
    "shardwise.comm._shm",
    ["shardwise/comm/shm_kernel.c", "shardwise/comm/shm_module.c", "shardwise/comm/codec_kernel.c"],
    depends=["shardwise/comm/kernel.h"],
    extra_compile_args=["-O3", "-fwrapv", "-fno-tree-loop-distribute-patterns", "-ffp-contract=off", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(ext_modules=[KERNEL] if sys.platform == "linux" else [])
