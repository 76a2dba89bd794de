"""Reads tensors out of an untrusted file: safetensors, or a pickle that is not allowed to do anything.

``torch.load(weights_only=True)`` with ``argparse.Namespace`` as the one class let through: official EViT checkpoints
keep their keep rate in one. Nothing in a file is ever executed.
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from evit_deploy.errors import CheckpointError, first_few
from evit_deploy.models.files.prefixes import without_common

# Which weights a file with several sets means by itself. DeiT and EViT save `model_ema` and never evaluate it; timm's
# trainer saves `state_dict_ema` and evaluates that one when it is there. DINO and iBOT evaluate the teacher.
_WRAPPERS = ("model", "state_dict_ema", "state_dict", "model_ema", "teacher", "student")


class Weights(msgspec.Struct):
    """What a file holds.

    Args:
        tensors: By name.
        metadata: Of a safetensors file.
        args: What a training script left beside the weights, if anything.
        notes: What was chosen among several.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = {}
    args: Any = None
    notes: list[str] = []


def split_part(source: str | Path) -> tuple[Path, str]:
    """A source's path, and the part of the file that is meant: ``weights.pth#teacher`` is the teacher's.

    Args:
        source: As the user wrote it; a file whose name has a ``#`` is that file.
    """
    path = Path(source)
    before, mark, part = path.name.rpartition("#")
    try:
        if not mark or not before or path.exists():
            return path, ""
    except OSError:  # a name too long for any file
        return path, ""
    return path.with_name(before), part.strip(".")


def read_weights(path: Path, part: str = "") -> Weights:
    """Reads a file, by what is in it and not by its name.

    Args:
        path: The file.
        part: What the names of the wanted tensors begin with, dictionaries of the file included; see
            :func:`split_part`.

    Raises:
        CheckpointError: Missing, empty, damaged, no weights, weights that are not finite, a pickle that is more than
            weights, or no such part.
    """
    head = _read_head(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        weights = _read_safetensors(path)
    else:
        content = _read_pickle(path, is_zip=head.startswith(b"PK"))
        flat = _flat(content) if part else {}
        named = any(name.startswith(part + ".") for name in flat)
        weights = Weights(flat, args=content.get("args")) if named else _unwrap(path, content)
    if part:
        weights = msgspec.structs.replace(weights, tensors=_part(path, weights.tensors, part), notes=[])
    weights.tensors = without_common(weights.tensors)
    _check_finite(path, weights.tensors)
    return weights


def read_shards(where: Path, files: Sequence[Path], index: Mapping[str, str], part: str = "") -> Weights:
    """Reads tensors that lie in several files.

    Args:
        where: Their index or folder, for messages.
        files: The files.
        index: Name of the file of each tensor.
        part: See :func:`read_weights`.

    Raises:
        CheckpointError: See :func:`read_weights`; or a file lacks a tensor that the index promises, or holds another.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        head = _read_head(file)
        held = (
            _read_safetensors(file) if head[8:9] == b"{" else _unwrap(file, _read_pickle(file, is_zip=head[:1] == b"P"))
        )
        promised = {name for name, home in index.items() if home == file.name}
        if promised != held.tensors.keys():
            raise CheckpointError(
                f"{file.name} does not hold the tensors that its index names", where=where,
                seen=first_few(sorted(promised ^ held.tensors.keys())), fix="Download all files again.",
            )  # fmt: skip
        tensors |= held.tensors
    tensors = without_common(_part(where, tensors, part) if part else tensors)
    _check_finite(where, tensors)
    return Weights(tensors)


def _flat(content: dict[str, Any], prefix: str = "", depth: int = 3) -> dict[str, Tensor]:
    """All tensors of nested dictionaries, under names with dots between."""
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict) and depth:
            found |= _flat(value, f"{prefix}{key}.", depth - 1)
    return found


def _part(path: Path, weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    found = {name[len(part) + 1 :]: value for name, value in weights.items() if name.startswith(part + ".")}
    if not found:
        begins = dict.fromkeys(name.split(".", 1)[0] for name in weights)
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
            wanted="a PyTorch or safetensors file",
        )  # fmt: skip
    return head


def _read_safetensors(path: Path) -> Weights:
    import safetensors
    from safetensors.torch import load_file

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return Weights(load_file(path), metadata)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"not a whole safetensors file: {error}", where=path, fix="Download it again.") from None


def _read_pickle(path: Path, *, is_zip: bool) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch suspects aloud; what is wrong is said below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _refused_pickle(path, str(error)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                "a TorchScript program, not weights", where=path, fix="Save the original model's state_dict()."
            ) from None
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"the file is damaged or cut short ({first_line[:120]})", where=path, fix="Download or save it again."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            "not a dictionary of weights", where=path, seen=f"a {type(content).__name__}", wanted="a state_dict"
        )
    return content


def _ends_within(path: Path, name: str) -> bool:
    """Whether a file was cut short in the name of a class: the unpickler reads all of it but the last letter."""
    module, _, attribute = name.rpartition(".")
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(-min(file.tell(), len(name) + 2), 2)
        return file.read()[:-1].endswith(f"{module}\n{attribute}".encode())


def _refused_pickle(path: Path, reason: str) -> CheckpointError:
    found = re.search(r"(?:GLOBAL|Unsupported global:|class) ([\w.]+)", reason.replace("GLOBAL GLOBAL", "GLOBAL"))
    found = re.search(r"GLOBAL ([\w.]+) was not", reason) or found
    name = found.group(1) if found else None
    if name is None or _ends_within(path, name):
        return CheckpointError("the file is damaged or not a PyTorch checkpoint", where=path, fix="Save it again.")
    if name.startswith(("timm.", "torch.nn.", "torchvision.", "__main__")) or "VisionTransformer" in name:
        return CheckpointError(
            f"a whole pickled model ({name}), which would have to run code to be read",
            where=path,
            fix="Where it was made, run torch.save(model.state_dict(), 'weights.pth') and give that file.",
        )
    return CheckpointError(
        f"it wants to run {name} while being read; it was not run", where=path, wanted="tensors only",
        fix="Save the weights alone: torch.save(model.state_dict(), 'weights.pth'). Do not trust this file.",
    )  # fmt: skip


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _unwrap(path: Path, content: dict[str, Any]) -> Weights:
    notes = []
    present = [name for name in _WRAPPERS if _is_weights(content.get(name))]
    if present:
        weights = content[present[0]]
        if len(present) > 1:
            notes.append(f"it holds {' and '.join(present)}; {present[0]!r} is used")
    elif _is_weights(content):
        weights = content
    else:
        keys = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise CheckpointError(
            "no weights in it", where=path, seen=f"a dictionary with {keys}",
            wanted=f"tensors, bare or under one of {', '.join(_WRAPPERS)}",
        )  # fmt: skip
    return Weights(weights, args=content.get("args"), notes=notes)


def _check_finite(path: Path, weights: dict[str, Tensor]) -> None:
    bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            "weights that are NaN or infinite", where=path, seen=first_few(bad), wanted="finite numbers",
            fix="The training that wrote it diverged; use an earlier checkpoint.",
        )  # fmt: skip
