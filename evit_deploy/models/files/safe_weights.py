"""Reads tensors from an untrusted file: safetensors, or a pickle of which nothing is executed.

The weights are selected among a file's tensors by their descriptions (:mod:`evit_deploy.tensor_files`); only these are
created, after checking them.
"""

import reprlib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from evit_deploy.errors import CheckpointError, first_few
from evit_deploy.models.files.prefixes import without_common
from evit_deploy.tensor_files.described import MOST_TENSORS, Described, Odd
from evit_deploy.tensor_files.safetensors_file import read_safetensors
from evit_deploy.tensor_files.torch_file import TorchFile, open_torch

# Which of several sets of weights is used by default. DeiT and EViT save `model_ema` and never evaluate it; timm's
# trainer saves `state_dict_ema` and evaluates it if present. DINO and iBOT evaluate the teacher.
_WRAPPERS = ("model", "state_dict_ema", "state_dict", "model_ema", "teacher", "student")


class Weights(msgspec.Struct):
    """Content of a file.

    Args:
        tensors: By name.
        metadata: Metadata of a safetensors file.
        args: Arguments that a training script saved with the weights, if any.
        notes: Which of several sets was chosen.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = {}
    args: Any = None
    notes: list[str] = []


def split_part(source: str | Path) -> tuple[Path, str]:
    """Splits a source into its path and the selected part: ``weights.pth#teacher`` selects ``teacher``.

    Args:
        source: As given by the user. If a file with the whole name exists, ``#`` is part of its name.
    """
    path = Path(source)
    before, mark, part = path.name.rpartition("#")
    try:
        if not mark or not before or path.exists():
            return path, ""
    except OSError:  # the name is too long
        return path, ""
    return path.with_name(before), part.strip(".")


def read_weights(path: Path, part: str = "") -> Weights:
    """Reads a file; the format is detected from its content, not its name.

    Args:
        path: The file.
        part: Name prefix of the requested tensors, including the file's dictionaries; see :func:`split_part`.

    Raises:
        CheckpointError: The file is missing, empty or damaged, contains no weights or weights that are not finite, is a
            pickle with other content, or has no such part.
    """
    head = _read_head(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        weights = Weights(*read_safetensors(path, CheckpointError))
        weights.tensors = _part(path, weights.tensors, part) if part else weights.tensors
    else:
        weights = _read_pickle(path, part)
    weights.tensors = without_common(weights.tensors)
    _check_finite(path, weights.tensors)
    return weights


def read_shards(where: Path, files: Sequence[Path], index: Mapping[str, str], part: str = "") -> Weights:
    """Reads tensors from several files.

    Args:
        where: The index or folder, for messages.
        files: The files.
        index: Name of the file of each tensor.
        part: See :func:`read_weights`.

    Raises:
        CheckpointError: See :func:`read_weights`; or the tensors of a file do not match the index.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        head = _read_head(file)
        held = read_safetensors(file, CheckpointError)[0] if head[8:9] == b"{" else _read_pickle(file).tensors
        promised = {name for name, home in index.items() if home == file.name}
        if promised != held.keys():
            raise CheckpointError(
                f"{file.name} does not hold the tensors that its index names", where=where,
                seen=first_few(f"{name:.100}" for name in sorted(promised ^ held.keys())),
                fix="Download all files again.",
            )  # fmt: skip
        tensors |= held
    tensors = without_common(_part(where, tensors, part) if part else tensors)
    _check_finite(where, tensors)
    return Weights(tensors)


def _flat(where: Path, content: dict[Any, Any]) -> dict[str, Described | Odd]:
    """All tensors of nested dictionaries, up to four levels, with their keys joined by dots."""
    found: dict[str, Described | Odd] = {}
    level, entries = [("", content)], 0
    for _ in range(4):
        inside: list[tuple[str, dict[Any, Any]]] = []
        for prefix, held in level:
            entries += len(held)
            if entries > 10 * MOST_TENSORS:  # a pickle may reference one dictionary many times
                raise CheckpointError("dictionaries are nested too deeply", where=where)
            for key, value in held.items():
                if isinstance(value, Described | Odd):
                    found[f"{prefix}{key}"] = value
                elif isinstance(value, dict):
                    inside.append((f"{prefix}{key}.", value))
        level = inside
    return found


_Value = TypeVar("_Value")


def _part(path: Path, weights: dict[str, _Value], part: str) -> dict[str, _Value]:
    found = {name[len(part) + 1 :]: value for name, value in weights.items() if name.startswith(part + ".")}
    if not found:
        begins = dict.fromkeys(name.split(".", 1)[0][:60] for name in weights)
        raise CheckpointError(
            f"no tensors under {part!r}", where=path, seen="names that begin with " + first_few(begins, 6),
            fix="Give the beginning of their names after '#'.",
        )  # fmt: skip
    return found


def _read_head(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise CheckpointError("a folder, not a checkpoint file", where=path)
        if not path.exists():
            raise CheckpointError("no such file", where=path, fix="Check the path, or give a timm name.")
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe could block forever
            raise CheckpointError("a pipe, a socket or a device, not a checkpoint file", where=path)
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", where=path) from error
    if not head:
        raise CheckpointError("the file is empty", where=path, seen="0 bytes", fix="Download it again.")
    if head.startswith(b"version https://"):
        raise CheckpointError("a Git LFS pointer, not the checkpoint itself", where=path, fix="Run `git lfs pull`.")
    if path.suffix != ".safetensors" and head[8:9] != b"{" and not head.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            "not a checkpoint", where=path, seen=f"a file that begins with {head[:12]!r}",
            wanted="a PyTorch or safetensors file", fix="Give the file of weights that torch.save or save_file wrote.",
        )  # fmt: skip
    return head


def _read_pickle(path: Path, part: str = "") -> Weights:
    file = open_torch(path, CheckpointError)
    content = file.content
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, Described) else type(content).__name__
        raise CheckpointError("not a dictionary of weights", where=path, seen=f"a {kind}", wanted="a state_dict")
    if not part:
        return _unwrap(file, content)
    flat = _flat(path, content)
    named = any(name.startswith(part + ".") for name in flat)
    weights = flat if named else _chosen(path, content)[0]
    return Weights(
        file.tensors(_part(path, {str(name): value for name, value in weights.items()}, part)), args=content.get("args")
    )


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Described | Odd) for v in value.values())


def _unwrap(file: TorchFile, content: dict[Any, Any]) -> Weights:
    weights, notes = _chosen(file.path, content)
    return Weights(file.tensors(weights), args=content.get("args"), notes=notes)


def _chosen(path: Path, content: dict[Any, Any]) -> tuple[dict[Any, Described | Odd], list[str]]:
    """Selects the weights in a file's content, and notes which of several were chosen."""
    present = [name for name in _WRAPPERS if _is_weights(content.get(name))]
    if present:
        several = [f"it holds {' and '.join(present)}; {present[0]!r} is used"] if present[1:] else []
        return content[present[0]], several
    if _is_weights(content):
        return content, []
    keys = ", ".join(key if isinstance(key, str) and len(key) < 40 else reprlib.repr(key) for key in list(content)[:6])
    raise CheckpointError(
        "no weights in it", where=path, seen=f"a dictionary with {keys or 'nothing'}",
        wanted=f"tensors, bare or under one of {', '.join(_WRAPPERS)}",
    )  # fmt: skip


def _check_finite(path: Path, weights: dict[str, Tensor]) -> None:
    bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            "weights that are NaN or infinite", where=path, seen=first_few(bad), wanted="finite numbers",
            fix="The training that wrote it diverged; use an earlier checkpoint.",
        )  # fmt: skip
