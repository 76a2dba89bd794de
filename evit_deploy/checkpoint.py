"""Reads a checkpoint without trusting it and says what it is: architecture, image size, classes, token reduction.

A file is read as tensors only: ``torch.load(weights_only=True)`` with ``argparse.Namespace`` as the one class let through
(official EViT checkpoints keep their keep rate in one). Nothing in a checkpoint is ever executed.
"""

import argparse
import ast
import difflib
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from evit_deploy.data import Preprocess
from evit_deploy.errors import CheckpointError, InputError, MissingRequirement
from evit_deploy.identify import Identity, identify
from evit_deploy.tokens.plan import TokenSpec

METADATA_KEY = "evit_deploy"
FILE_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".bin", ".ckpt")
# Which weights a file with several sets means by itself. DeiT and EViT save `model_ema` and never evaluate it; timm's
# trainer saves `state_dict_ema` and evaluates that one when it is there.
_WRAPPERS = ("model", "state_dict_ema", "state_dict", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


class Checkpoint(msgspec.Struct):
    """Weights and what they are.

    Args:
        source: File path or timm name.
        sha256: Hash of the file; ``None`` for a timm name.
        weights: Tensors under timm's names.
        model: timm architecture.
        model_args: What ``timm.create_model`` needs besides the name.
        tokens: The reduction the weights were trained with, if the file says so.
        preprocess: The preprocessing the file asks for; ``None`` for the architecture's own.
        labels: Class names, if the file has them.
        notes: What was assumed or chosen, to be told to the user.
    """

    source: str
    sha256: str | None
    weights: dict[str, Tensor]
    model: str
    model_args: dict[str, Any]
    tokens: TokenSpec | None = None
    preprocess: Preprocess | None = None
    labels: list[str] | None = None
    notes: list[str] = []


def read_checkpoint(source: str | Path, model: str | None = None) -> Checkpoint:
    """Reads a checkpoint file, or fetches a timm name's pretrained weights.

    Args:
        source: ``.pth``, ``.pt``, ``.pth.tar`` or ``.safetensors`` file, or a timm name.
        model: timm name that decides the architecture instead of the tensors.

    Raises:
        CheckpointError: The file cannot be read as weights, holds weights that are not finite, or fits no model.
        InputError: Neither a file nor a timm name; or an unknown ``model``.
        MissingRequirement: Pretrained weights of a timm name cannot be fetched.
    """
    path = Path(source)
    if not path.exists() and not _looks_like_path(str(source)):
        return _from_timm(str(source), model)
    content, notes = _read_file(path)
    args, tokens, preprocess, labels, own = None, None, None, None, None
    if METADATA_KEY in content:
        own = content.pop(METADATA_KEY)
        tokens, preprocess, labels = own["tokens"], own["preprocess"], own["labels"] or None
        weights = content
    else:
        weights, args = _unwrap(path, content, notes)
    _check_finite(path, weights)
    tokens = tokens or _tokens_of_args(path, args)
    if own is not None and model is None:
        identity = Identity(own["model"], own["model_args"], weights, [])
    else:
        identity = identify(path, weights, model)
    return Checkpoint(
        source=str(source),
        sha256=_sha256(path),
        weights=identity.weights,
        model=identity.model,
        model_args=identity.model_args,
        tokens=tokens,
        preprocess=preprocess,
        labels=labels,
        notes=notes + identity.notes,
    )


def build_model(checkpoint: Checkpoint, image_size: int | None = None) -> torch.nn.Module:
    """Builds the dense model and loads the weights, strictly.

    Args:
        checkpoint: What to build.
        image_size: Pixels, another size than the checkpoint's: the position embedding is resampled as timm does.

    Returns:
        The model in evaluation mode, FP32.

    Raises:
        CheckpointError: The weights do not fit the architecture.
        InputError: The patch size does not divide the image size.
    """
    import timm

    try:
        model = timm.create_model(checkpoint.model, pretrained=False, **checkpoint.model_args)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise CheckpointError(
            f"timm cannot build {checkpoint.model!r} with {checkpoint.model_args}: {error}", where=checkpoint.source
        ) from error
    missing, unexpected, shapes = _differences(model.state_dict(), checkpoint.weights)
    if missing or unexpected or shapes:
        parts = [
            f"{label} {_some(names)}" for label, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise CheckpointError(
            "the weights do not fit the architecture",
            where=checkpoint.source,
            seen="; ".join(parts + ([f"other shapes {_some(shapes)}"] if shapes else [])),
            wanted=f"the tensors of {checkpoint.model}",
            fix="Name the right architecture with --model.",
        )
    model.load_state_dict(checkpoint.weights)
    if image_size is not None:
        set_image_size_(model, image_size)
    return model.eval()


def set_image_size_(model: Any, image_size: int) -> None:
    """Changes the image size a model takes, in place.

    Raises:
        InputError: The patch size does not divide it.
    """
    patch = model.patch_embed.patch_size
    if image_size <= 0 or any(image_size % p for p in patch):
        below = max(image_size // patch[0], 1) * patch[0]
        raise InputError(
            f"the patch size {patch[0]} does not divide the image size",
            where="--image-size",
            seen=image_size,
            wanted=f"a multiple of {patch[0]} such as {below} or {below + patch[0]}",
        )
    if tuple(model.patch_embed.img_size) != (image_size, image_size):
        model.set_input_size(img_size=(image_size, image_size))


def _looks_like_path(source: str) -> bool:
    return "/" in source or "\\" in source or source.endswith(FILE_SUFFIXES) or source.startswith((".", "~"))


def _from_timm(name: str, model: str | None) -> Checkpoint:
    import timm

    if model is not None and model != name:
        raise InputError(
            "a timm name already says which model it is",
            where="--model",
            seen=model,
            fix=f"Leave out --model or {name!r}.",
        )
    check_model_name(name, where="CHECKPOINT", also="an existing checkpoint file")
    try:
        pretrained = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network and cache raise their own kinds
        raise MissingRequirement(
            f"the pretrained weights of {name!r} could not be fetched ({type(error).__name__})",
            fix="Connect to the network once, or download the checkpoint and give its path with --model " + name + ".",
        ) from error
    cfg: Any = pretrained.pretrained_cfg
    size = cfg["input_size"][1]
    args = {"num_classes": cfg["num_classes"], "img_size": size}
    return Checkpoint(
        name, None, pretrained.state_dict(), name, args, preprocess=Preprocess.from_model(pretrained, size)
    )


def check_model_name(name: str, *, where: str, also: str | None = None) -> None:
    """Makes sure that timm knows a name.

    Raises:
        InputError: It does not; the message has the nearest names.
    """
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise InputError(
            "not a timm model" + (" nor a file" if also else ""),
            where=where,
            seen=repr(name),
            wanted="a timm name" + (f" or {also}" if also else ""),
            fix=f"Near it: {', '.join(near)}." if near else None,
        )


def _read_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    if path.is_dir():
        raise CheckpointError("a folder, not a checkpoint file", where=path)
    if not path.exists():
        raise CheckpointError("no such file", where=path, fix="Check the path, or give a timm name.")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", where=path) from error
    if not head:
        raise CheckpointError("the file is empty", where=path, seen="0 bytes", fix="Download it again.")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path), []
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        hint = "It is a Git LFS pointer: run `git lfs pull`." if head.startswith(b"version https://") else None
        raise CheckpointError(
            "not a checkpoint", where=path, seen=f"a file that begins with {head[:12]!r}",
            wanted="a PyTorch or safetensors file", fix=hint,
        )  # fmt: skip
    return _read_pickle(path, is_zip=head.startswith(b"PK")), []


def _read_safetensors(path: Path) -> dict[str, Any]:
    import safetensors
    from safetensors.torch import load_file

    try:
        content: dict[str, Any] = dict(load_file(path))
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"not a whole safetensors file: {error}", where=path, fix="Download it again.") from error
    if metadata is not None:
        content[METADATA_KEY] = _own_metadata(path, metadata)
    return content


class _OwnMetadata(msgspec.Struct):
    format: int
    model: str
    model_args: dict[str, Any]
    preprocess: Preprocess
    labels: list[str] | None
    tokens: TokenSpec | None


def _own_metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        return msgspec.structs.asdict(msgspec.json.decode(text, type=_OwnMetadata))
    except msgspec.DecodeError as error:
        raise CheckpointError(f"its {METADATA_KEY} metadata cannot be read: {error}", where=path) from error


def save_checkpoint(path: Path, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Writes weights with all that :func:`read_checkpoint` needs to know them again; whole or not at all.

    Args:
        path: ``.safetensors`` file.
        model: Its ``state_dict`` is written.
        checkpoint: Everything but the weights.
    """
    from safetensors.torch import save

    from evit_deploy.bundle import write_atomically

    assert checkpoint.preprocess is not None
    own = _OwnMetadata(
        1, checkpoint.model, checkpoint.model_args, checkpoint.preprocess, checkpoint.labels, checkpoint.tokens
    )
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(weights, metadata={METADATA_KEY: msgspec.json.encode(own).decode()}))


def _read_pickle(path: Path, *, is_zip: bool) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
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


def _refused_pickle(path: Path, reason: str) -> CheckpointError:
    found = re.search(r"(?:GLOBAL|Unsupported global:|class) ([\w.]+)", reason.replace("GLOBAL GLOBAL", "GLOBAL"))
    found = re.search(r"GLOBAL ([\w.]+) was not", reason) or found
    name = found.group(1) if found else None
    if name is None:
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


def _unwrap(path: Path, content: dict[str, Any], notes: list[str]) -> tuple[dict[str, Tensor], Any]:
    args = content.get("args")
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
    for prefix in _PREFIXES:
        if all(str(name).startswith(prefix) for name in weights):
            weights = {name[len(prefix) :]: value for name, value in weights.items()}
    return dict(weights), args


def _check_finite(path: Path, weights: dict[str, Tensor]) -> None:
    bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            "weights that are NaN or infinite", where=path, seen=_some(bad), wanted="finite numbers",
            fix="The training that wrote it diverged; use an earlier checkpoint.",
        )  # fmt: skip


def _tokens_of_args(path: Path, args: Any) -> TokenSpec | None:
    """The official EViT's arguments: base_keep_rate, drop_loc (text such as ``(3, 6, 9)``), fuse_token."""
    values = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    if "base_keep_rate" not in values:
        return None
    try:
        locations = values.get("drop_loc", "(3, 6, 9)")
        locations = ast.literal_eval(locations) if isinstance(locations, str) else locations
        locations = (locations,) if isinstance(locations, int) else tuple(locations)
        rate = values["base_keep_rate"]
        rate = tuple(map(float, rate)) if isinstance(rate, list | tuple) else float(rate)
        return TokenSpec(keep_rate=rate, locations=locations, fuse=bool(values.get("fuse_token", False)))
    except (ValueError, SyntaxError, TypeError) as error:
        seen = {name: values.get(name) for name in ("base_keep_rate", "drop_loc", "fuse_token")}
        raise CheckpointError(f"its EViT arguments make no sense: {error}", where=path, seen=seen) from None


def _differences(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and wanted[name].shape != given[name].shape
    ]
    return missing, unexpected, shapes


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
