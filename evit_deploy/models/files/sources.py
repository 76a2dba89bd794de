"""Locates a checkpoint's files: a single file, a folder saved by Hugging Face, timm or OpenCLIP, or a hub id.

Configuration files such as ``config.json`` are read here as plain dictionaries, and interpreted in
:mod:`evit_deploy.models.layouts` (architecture) and :mod:`evit_deploy.models.preprocessing`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from evit_deploy.documents import read_json
from evit_deploy.errors import CheckpointError, first_few
from evit_deploy.files import sha256
from evit_deploy.models.files import hub
from evit_deploy.models.files.safe_weights import Weights, read_shards, read_weights, split_part

FILE_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".bin", ".ckpt")
# Weight files in the order in which the saving libraries look for them; an index lists the shards.
_STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_INDEX = ".index.json"
CONFIGS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
"""Configuration files that may accompany weights."""


class Source(msgspec.Struct, frozen=True):
    """The files of one checkpoint.

    Args:
        name: As given by the user; ``hf-hub:org/name`` for a hub id.
        path: The local file or folder.
        files: The weights: one file, or all shards.
        configs: Content of each of :data:`CONFIGS` found next to the weights.
        index: Tensor name -> file name of its shard; empty for a single file.
        notes: Which of several files was chosen.
        part: Name prefix of the requested tensors, see :func:`~evit_deploy.models.files.safe_weights.split_part`.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    configs: Mapping[str, dict[str, Any]] = {}
    index: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    part: str = ""

    @property
    def config(self) -> dict[str, Any] | None:
        """The config with the architecture: ``config.json``, or OpenCLIP's own file."""
        return self.configs.get("config.json") or self.configs.get("open_clip_config.json")

    @property
    def digest(self) -> str:
        """SHA-256 of the weights: of the file, or of the shards' names and hashes."""
        if len(self.files) == 1:
            return sha256(self.files[0])
        lines = [f"{file.name} {sha256(file)}\n" for file in self.files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read(self) -> Weights:
        """Reads the tensors.

        Raises:
            CheckpointError: See :func:`~evit_deploy.models.files.safe_weights.read_weights`; or the shards do not match
                their index.
        """
        if not self.index:
            return read_weights(self.files[0], self.part)
        return read_shards(self.path, self.files, self.index, self.part)


def find_source(source: str | Path) -> Source | None:
    """Resolves a path or a hub id to its files; ``None`` for what can only be a timm name.

    Args:
        source: File, folder, ``hf-hub:org/name`` or ``org/name``; a hub id may be followed by ``@revision``, and
            ``#part`` selects one of several models.

    Raises:
        CheckpointError: The file does not exist, or a folder holds no or ambiguous weights.
        InputError: An invalid hub id.
        MissingRequirement: The repository is not in the cache, and the hub cannot be reached.
    """
    path, part = split_part(source)
    if _exists(path):
        found = _folder(path) if path.is_dir() else _file(path)
        return msgspec.structs.replace(found, name=str(source), part=part)
    text = str(source).partition("#")[0]
    repository = None if text.endswith(FILE_SUFFIXES) else hub.repository_of(text)
    if repository is not None:
        folder = hub.fetch(repository, lambda names: _wanted(repository.name, names), _complete)
        name = repository.name + (f"#{part}" if part else "")
        return msgspec.structs.replace(_folder(folder, where=repository.name), name=name, part=part)
    if _looks_like_path(text):
        return _file(path)  # reading it raises the error for a missing file
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long or contains a null character
        return False


def _looks_like_path(source: str) -> bool:
    return "/" in source or "\\" in source or source.endswith(FILE_SUFFIXES) or source.startswith((".", "~"))


def _file(path: Path) -> Source:
    """A single file. If it has a standard name, the configuration next to it is read, as for a folder."""
    if path.name.endswith(_INDEX):
        return _sharded(path, path.parent)
    configs = read_configs(path.parent) if path.name in _STANDARD else {}
    return Source(str(path), path, (path,), configs)


def _folder(path: Path, where: object = None) -> Source:
    where = path if where is None else where
    try:
        names = sorted(file.name for file in path.iterdir() if file.is_file())
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read ({error.strerror})", where=where) from None
    if "manifest.json" in names:
        raise CheckpointError(
            "a bundle, not a checkpoint", where=where, fix="Give the checkpoint that it was made from."
        )
    chosen, notes = _choose(where, names)
    made = _sharded(path / chosen, path) if chosen.endswith(_INDEX) else Source(str(path), path, (path / chosen,))
    return msgspec.structs.replace(made, path=path, name=str(path), configs=read_configs(path), notes=notes)


def _choose(where: object, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Chooses the weights to read in a folder.

    Raises:
        CheckpointError: There are none, or several that are not forms of the same weights.
    """
    standard = [name for name in _STANDARD if name in names]
    if standard:
        left = f"; {' and '.join(standard[1:])} {'is' if len(standard) == 2 else 'are'} left alone"
        return standard[0], ((f"{standard[0]} is read{left}",) if standard[1:] else ())
    found = [name for name in names if name.endswith(FILE_SUFFIXES)]
    if len(found) == 1:
        return found[0], ()
    if found:
        raise CheckpointError(
            "a folder with several weight files", where=where, seen=first_few(found, 5),
            wanted="one, or " + " or ".join(_STANDARD[:4:3]), fix="Give the path of the file that you mean.",
        )  # fmt: skip
    raise CheckpointError(
        "a folder without weights", where=where, seen=first_few(names, 5) or "no files",
        wanted=", ".join(name for name in _STANDARD if not name.endswith(_INDEX)), fix="Give the path of the file.",
    )  # fmt: skip


def _sharded(index: Path, folder: Path) -> Source:
    """Weights in several files, listed by ``*.index.json``.

    Raises:
        CheckpointError: The index is invalid, or shards are missing.
    """
    content = read_json(index, dict[str, Any], error=CheckpointError)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError("an index without a weight_map", where=index, wanted='{"weight_map": {tensor: file}}')
    names = sorted(set(shards.values()))
    strange = next((name for name in names if Path(name).name != name or not name.endswith(FILE_SUFFIXES)), None)
    if strange is not None:
        raise CheckpointError(
            "a shard is not a weight file next to its index", where=index, seen=repr(strange[:100]),
            wanted="a file name such as model-00001-of-00002.safetensors",
        )  # fmt: skip
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            "shards are missing", where=folder, seen=f"{len(names) - len(missing)} of {len(names)}",
            wanted=first_few(missing, 5), fix="Download them too.",
        )  # fmt: skip
    files = tuple(folder / name for name in names)
    return Source(str(index), index, files, read_configs(folder), shards)


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the configuration files next to weights.

    Raises:
        CheckpointError: Such a file does not contain a JSON object.
    """
    return {
        name: read_json(folder / name, dict[str, Any], error=CheckpointError)
        for name in CONFIGS
        if (folder / name).is_file()
    }


def _complete(folder: Path) -> bool:
    """Whether a folder of the hub's cache holds weights with all their shards."""
    try:
        return all(file.is_file() for file in _folder(folder).files)
    except CheckpointError:
        return False


def _wanted(where: str, names: Sequence[str]) -> list[str]:
    """The files of a hub repository to fetch: configuration files, and one form of the weights."""
    chosen, _ = _choose(where, [name for name in names if "/" not in name])
    shards = re.escape(chosen.removesuffix(_INDEX)).replace(r"\.", r"-\d+-of-\d+\.", 1) if _INDEX in chosen else r"(?!)"
    return [name for name in names if name in (chosen, *CONFIGS) or re.fullmatch(shards, name)]
