"""Libraries built by ``evit-deploy plugin build``: their embedded identity, and the folder where they are stored.

A library's code runs in the process that loads it, so libraries are inspected before loading.
"""

import os
import re
from pathlib import Path

import msgspec

from evit_deploy.errors import InputError

KERNEL = "libevit_token_reorg.so"
"""File name of the kernel without TensorRT."""
ABI = 2
"""Version of the C interface in ``token_reorg.h``."""
_IDENTITY = re.compile(
    rb"evit-deploy library: kind=(?P<kind>\w+) version=(?P<version>[\w.+-]+) abi=(?P<abi>\d+) "
    rb"architectures=(?P<architectures>[\w,-]+) tensorrt=(?P<tensorrt>[\w.]+);"
)


class Identity(msgspec.Struct, frozen=True):
    """The identity embedded in a library.

    Args:
        kind: ``registers`` (the plugin, for Triton, trtexec ``--staticPlugins`` and polygraphy), ``creators`` (the
            plugin, for trtexec ``--dynamicPlugins``), ``kernel`` (without TensorRT) or ``host`` (on the CPU).
        version: Version of evit-deploy.
        abi: Version of its C interface.
        architectures: CUDA architectures it has code for, in CMake's notation: ``80-real``, or ``120`` with PTX.
        tensorrt: Version of the TensorRT headers it was built with; ``None`` for a library without TensorRT.
    """

    kind: str
    version: str
    abi: int
    architectures: tuple[str, ...]
    tensorrt: str | None


def read_identity(library: Path) -> Identity:
    """Reads a library's identity from its file, without running its code.

    Raises:
        InputError: There is no such file, or evit-deploy did not build it.
    """
    try:
        found = _IDENTITY.search(library.read_bytes())
    except OSError as error:
        raise InputError(f"the library cannot be read ({error.strerror})", where=library) from None
    if found is None:
        raise InputError(
            "not a library that evit-deploy built", where=library, fix="Build one: evit-deploy plugin build."
        )
    known = {name: value.decode() for name, value in found.groupdict().items()}
    architectures = () if known["architectures"] == "none" else tuple(known["architectures"].split(","))
    tensorrt = None if known["tensorrt"] == "none" else known["tensorrt"]
    return Identity(known["kind"], known["version"], int(known["abi"]), architectures, tensorrt)


def cache() -> Path:
    """Where ``plugin build`` stores libraries: ``$XDG_CACHE_HOME/evit-deploy/plugins``, one folder per version."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache") / "evit-deploy" / "plugins"
