"""The TensorRT plugin for ``evit::TokenReorg``: finding, checking and loading its library.

Without the plugin TensorRT builds the operator's ONNX function into the engine, a dozen small kernels; with it the
reorganization is a single kernel. A plan built with the plugin needs it to run. Since the library's code runs in this
process, a library that merely sits next to a plan is never loaded: it must be named, or be in the user's cache (from
``evit-deploy plugin build``) with the SHA-256 from the manifest.
"""

import ctypes
import importlib
from pathlib import Path
from typing import Any

from evit_deploy.bundle.manifest import Engine
from evit_deploy.environment.availability import TENSORRT
from evit_deploy.environment.requirements import version_of
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.files import sha256
from evit_deploy.registry import RUNTIMES
from evit_deploy.tokens.operators.library import ABI, Identity, cache, read_identity

LIBRARY = "libevit_plugin.so"
"""Library that registers itself when it is loaded."""
CREATORS = "libevit_plugin_creators.so"
"""Library that TensorRT loads and registers."""
PLUGIN = ("evit", "TokenReorg")
"""Namespace and name in TensorRT's registry: the operator's domain and name in
:mod:`evit_deploy.tokens.operators.token_reorg`, which imports PyTorch, as the builder's process does not."""
BUILD = "evit-deploy plugin build"
_LOADED: dict[Path, ctypes.CDLL] = {}  # never unloaded, since TensorRT's registry refers to their creators


def choose_plugin(choice: str | Path | None, wanted: str | None = None) -> Path | None:
    """Returns the chosen library, checked but not loaded.

    Args:
        choice: A path; ``auto`` for a library in the cache; ``none`` or ``None`` for no plugin.
        wanted: Required SHA-256, from a manifest; ``None`` accepts any library for the installed TensorRT.

    Raises:
        InputError: The library is not a plugin, has another interface, or another SHA-256.
        MissingRequirement: The cache has no such library, or it is for another TensorRT than the installed one.
    """
    if choice is None or str(choice) == "none":
        return None
    if str(choice) == "auto":
        return _in_cache(wanted)
    path = Path(choice)
    _check(path, read_identity(path))
    if wanted is not None and sha256(path) != wanted:
        raise InputError(
            "the plan was built with a different library", where=path, seen=f"SHA-256 {sha256(path)[:12]}",
            wanted=wanted[:12], fix="Give that one, or convert again with this one.",
        )  # fmt: skip
    return path


def _in_cache(wanted: str | None) -> Path:
    found = sorted(cache().glob(f"*/{LIBRARY}"), key=lambda path: path.stat().st_mtime, reverse=True)
    if wanted is not None:
        for path in found:
            if sha256(path) == wanted:
                _check(path, read_identity(path))
                return path
        raise MissingRequirement(
            f"the plan needs the plugin library with SHA-256 {wanted[:12]}, which is not in {cache()}",
            where="--plugin auto",
            fix="Pass --plugin PATH, or convert again with the library you have: a rebuilt library has a different "
            "hash.",
        )  # fmt: skip
    for path in found:
        if not _misfits(read_identity(path)):
            return path
    raise MissingRequirement(f"no plugin for {_tensorrt()} is in {cache()}", where="--plugin auto", fix=f"Run: {BUILD}")


def _tensorrt() -> str:
    version = version_of(TENSORRT)
    return f"TensorRT {version}" if version else "TensorRT"


def misfit(identity: Identity) -> str | None:
    """Returns why a library does not match the installed TensorRT; ``None`` if it does, or if none is installed."""
    installed = version_of(TENSORRT)
    if installed is None or identity.tensorrt is None:
        return None
    built, here = (int(version.split(".")[0]) for version in (identity.tensorrt, installed))
    return f"it was built for TensorRT {built}, and TensorRT {here} is installed" if built != here else None


def _misfits(identity: Identity) -> bool:
    return identity.kind != "registers" or identity.abi != ABI or misfit(identity) is not None


def _check(path: Path, identity: Identity) -> None:
    if identity.kind != "registers":
        raise InputError(
            f"the library does not register a plugin when it is loaded (it is a library of kind {identity.kind})",
            where=path, wanted=LIBRARY, fix=f"Both are built by: {BUILD}.",
        )  # fmt: skip
    if identity.abi != ABI:
        raise InputError(
            "the library has a different interface",
            where=path,
            seen=identity.abi,
            wanted=ABI,
            fix=f"Build it: {BUILD}.",
        )
    if (reason := misfit(identity)) is not None:
        raise MissingRequirement(f"the plugin cannot be used here: {reason}", where=path, fix=f"Run: {BUILD}")


def load_plugin(path: Path) -> None:
    """Loads a library into this process, where it registers itself with TensorRT, which must be installed.

    Raises:
        InputError: It is not a plugin of evit-deploy, or not for this machine.
        MissingRequirement: It is for another TensorRT.
    """
    path = path.resolve()
    if path in _LOADED:
        return
    _check(path, read_identity(path))
    importlib.import_module(TENSORRT)  # the library registers itself with the TensorRT in the process
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(
            f"the plugin library cannot be loaded ({error})", where=path, fix=f"Build it on this machine: {BUILD}."
        ) from None
    refusal = refusal_of(library)
    if refusal is not None:
        raise MissingRequirement(f"TensorRT has not taken the plugin: {refusal}", where=path)
    _LOADED[path] = library


def refusal_of(library: Any) -> str | None:
    """Returns why a loaded library did not register its plugin, or ``None`` if it did."""
    library.evit_plugin_refusal.restype = ctypes.c_char_p
    refusal = library.evit_plugin_refusal()
    return None if refusal is None else refusal.decode(errors="replace")


def plugin_for(engine: Engine | None, choice: str | Path | None) -> Path | None:
    """Returns the library that an engine needs to run.

    Args:
        engine: The manifest's record; ``None`` for a plan without a manifest.
        choice: See :func:`choose_plugin`; ``None`` means ``auto`` if the engine needs a plugin.

    Raises:
        InputError: See :func:`choose_plugin`; or the engine needs a plugin and the choice is ``none``.
        MissingRequirement: See :func:`choose_plugin`.
    """
    if engine is None:
        return None if str(choice) == "auto" else choose_plugin(choice)  # unknown which library it needs
    if engine.plugin is None:
        if str(choice) in ("None", "none", "auto"):
            return None
        raise InputError(
            "the engine needs no plugin: the operator's body is built in", where="--plugin", seen=choice,
            fix="Leave it out.",
        )  # fmt: skip
    if str(choice) == "none":
        raise InputError("the engine was built with a plugin", where="--plugin none", fix="Leave it out.")
    return choose_plugin(choice or "auto", engine.plugin)


def provide_plugin(engine: Engine | None, choice: str | Path | None) -> MissingRequirement | None:
    """Loads the library that an engine needs, if TensorRT can run here.

    Args:
        engine: See :func:`plugin_for`.
        choice: See :func:`plugin_for`.

    Returns:
        The error if the library is missing, else ``None``.

    Raises:
        InputError: See :func:`plugin_for` and :func:`load_plugin`.
    """
    try:
        path = plugin_for(engine, choice)
        if path is not None and RUNTIMES.get(TENSORRT).missing() is None:
            load_plugin(path)
    except MissingRequirement as error:
        return error
    return None
