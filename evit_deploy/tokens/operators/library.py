"""The libraries that ``evit-deploy plugin build`` makes: the identity that each contains, and where they are kept.

A library's code runs in the process that loads it, so libraries are inspected before loading.
"""

import os
import re
from pathlib import Path

import msgspec

from evit_deploy.errors import InputError

KERNEL = "libevit_token_reorg.so"
"""The kernel, with no TensorRT in it."""
ABI = 2
"""Of ``token_reorg.h``."""
_IDENTITY = re.compile(
    rb"evit-deploy library: kind=(?P<kind>\w+) version=(?P<version>[\w.+-]+) abi=(?P<abi>\d+) "
    rb"architectures=(?P<architectures>[\w,-]+) tensorrt=(?P<tensorrt>[\w.]+);"
)


class Identity(msgspec.Struct, frozen=True):
    """The identity that a library contains.

    Args:
        kind: ``registers`` (the plugin, for Triton, trtexec ``--staticPlugins`` and polygraphy), ``creators`` (the
            plugin, for trtexec ``--dynamicPlugins``), ``kernel`` (without TensorRT) or ``host`` (on the CPU).
        version: Of evit-deploy.
        abi: Of its C interface.
        architectures: CUDA architectures it has code for, as CMake writes them: ``80-real``, or ``120`` with PTX.
        tensorrt: Version of the headers it was built with; ``None`` where there is no TensorRT in it.
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
    told = {name: value.decode() for name, value in found.groupdict().items()}
    architectures = () if told["architectures"] == "none" else tuple(told["architectures"].split(","))
    tensorrt = None if told["tensorrt"] == "none" else told["tensorrt"]
    return Identity(told["kind"], told["version"], int(told["abi"]), architectures, tensorrt)


def cache() -> Path:
    """Where ``plugin build`` puts libraries: ``$XDG_CACHE_HOME/evit-deploy/plugins``, a folder for each version."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache") / "evit-deploy" / "plugins"
