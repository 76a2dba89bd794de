"""Opens runners by name, and selects the artifact of a bundle for each runtime."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.manifest import TWIN
from evit_deploy.errors import InputError
from evit_deploy.registry import RUNTIMES
from evit_deploy.runtimes.runner import Runner
from evit_deploy.triton.connection import Server

TRITON = "triton"


@contextmanager
def opened(
    name: str, artifact: Any, threads: int | None = None, *, with_indices: bool = False, tf32: bool = False
) -> Iterator[Runner]:
    """Opens the runner of a runtime.

    Raises:
        InputError: No such runtime, or it cannot run this artifact, or has no TF32.
        MissingRequirement: The runtime is not installed, or its device is missing or has no TF32.
    """
    runtime: type[Runner] = RUNTIMES.get(name)
    check_tf32(name, tf32=tf32)
    reasons = runtime.accepts(artifact)  # before `missing`, because another machine would not help
    if reasons:
        raise InputError(f"the runtime {name!r} cannot run this: {'; '.join(reasons)}", where="--runtime")
    missing = runtime.missing()
    if missing is not None:
        raise missing
    more: dict[str, Any] = {"tf32": True} if tf32 else {}  # other runners have no such parameter
    with runtime(artifact, threads=threads, with_indices=with_indices, **more) as runner:
        yield runner


def check_tf32(name: str, *, tf32: bool = True) -> None:
    """Refuses TF32 for a runtime without it.

    Raises:
        InputError: The runtime has no TF32.
    """
    if tf32 and not RUNTIMES.get(name).has_tf32:
        those = " or ".join(other for other in RUNTIMES.names() if RUNTIMES.get(other).has_tf32)
        raise InputError(f"{name} has no tf32", wanted=those, fix="Use fp32 with it.")


def usable(runtime: type[Runner], artifact: Any) -> bool:
    """Whether a runtime can run an artifact here and is used by default."""
    return runtime.default and runtime.missing() is None and not runtime.accepts(artifact)


def artifact_of(bundle: bundles.Bundle, runtime: type[Runner], *, dense: bool = False) -> Path | None:
    """Returns the file of a bundle that a runtime prefers, or ``None`` if it can run none of them.

    Args:
        bundle: The bundle.
        runtime: A class from the registry of runtimes.
        dense: Whether to return the dense twin's file.
    """
    names = (TWIN * dense + name for name in runtime.files)
    found = next((name for name in names if name in bundle.manifest.files), None)
    return bundle.file(found) if found else None


def subject_of(
    bundle: bundles.Bundle, runtime: type[Runner], model: torch.nn.Module | None, server: Server | None
) -> Any:
    """Returns a runtime's artifact for a bundle: one of its files, its PyTorch model, or the model on a server.

    Args:
        bundle: The bundle.
        runtime: A class from the registry of runtimes.
        model: The PyTorch model, if available.
        server: The server, if any.

    Returns:
        The artifact, or ``None`` if there is none for this runtime.
    """
    if runtime.served:
        return server
    return artifact_of(bundle, runtime) if runtime.files else model


def check_server(runtimes: Sequence[str], server: Server | None) -> tuple[str, ...]:
    """Returns the runtimes to use; with a server and no requested runtimes, only the server's.

    Args:
        runtimes: Names of the requested runtimes.
        server: The server, if one was given.

    Raises:
        InputError: A server was given and no requested runtime uses it, or the reverse.
    """
    asked = any(RUNTIMES.get(name).served for name in runtimes)
    if asked and server is None:
        raise InputError(
            "it runs on a server, and none was named", where=f"--runtime {TRITON}", fix="Give --url http://HOST:8000."
        )
    if server is not None and runtimes and not asked:
        raise InputError(
            "none of these runtimes uses a server", where="--url", seen=", ".join(runtimes),
            fix=f"Give --runtime {TRITON} too.",
        )  # fmt: skip
    return tuple(runtimes) if runtimes or server is None else (TRITON,)
