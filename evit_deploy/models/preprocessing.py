"""Finds the preprocessing and the class names that belong to weights.

Sources are ``preprocessor_config.json`` of Hugging Face transformers, ``config.json`` of timm's and OpenCLIP's hub
layouts, and the arguments that a training script saved in the checkpoint.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from evit_deploy.data.labels import check_labels, read_labels
from evit_deploy.data.preprocess import CENTER_FLOOR, Preprocess
from evit_deploy.errors import CheckpointError, InputError
from evit_deploy.recipe.options import PreprocessOptions

# PIL's resampling filters by number, under timm's names.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_HALF = (0.5, 0.5, 0.5)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Processor(msgspec.Struct, frozen=True):
    """Defaults of an image processor of transformers."""

    interpolation: str = "bicubic"
    shorter_side: bool = False
    """Whether ``size: 224`` is the shorter side of the resized image, instead of both sides."""
    crops: bool = False
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF


_PROCESSORS = {
    "ViT": _Processor("bilinear"),
    "DeiT": _Processor(crops=True),
    "CLIP": _Processor("bicubic", True, True, *_CLIP),
    "Bit": _Processor("bicubic", True, True, *_CLIP),  # DINOv2
}
_PROCESSOR = "preprocessor_config.json"


class Said(msgspec.Struct, frozen=True):
    """A value found for a checkpoint, with its origin.

    Args:
        value: The value.
        origin: Where it was found, as text: the file, or ``the checkpoint's arguments``.
    """

    value: Any
    origin: str


class Inputs(msgspec.Struct, frozen=True):
    """A model's preprocessing and class names, with their origins.

    Args:
        preprocess: From image file to input.
        labels: Class names, if known.
        origins: Where each comes from, as text.
        notes: Assumptions.
    """

    preprocess: Preprocess
    labels: list[str] | None
    origins: dict[str, str]
    notes: tuple[str, ...] = ()


def resolve_inputs(
    architecture: str,
    classes: int | None,
    said: Said | None,
    names: Said | None,
    asked: PreprocessOptions,
    *,
    chosen: bool = False,
) -> Inputs:
    """Combines the user's values with the checkpoint's and with timm's for the architecture.

    Args:
        architecture: timm name.
        classes: Number of classes; 0 for a model that returns an embedding, ``None`` if unknown.
        said: The checkpoint's preprocessing.
        names: The checkpoint's class names.
        asked: The user's values, which take precedence.
        chosen: Whether timm's preprocessing of the architecture certainly applies: the user named it, or the weights
            fit no other.

    Raises:
        InputError: The number of labels is wrong, or mean and deviation differ in length.
    """
    notes: list[str] = []
    base = said.value if said is not None else of_architecture(architecture)
    origin = said.origin if said is not None else f"timm's {architecture}"
    fields = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    given = {field: value for field in fields if (value := getattr(asked, field)) is not None}
    mean, std = given.get("mean", base.mean), given.get("std", base.std)
    if len(mean) != len(std):
        raise InputError(
            "both need one number per channel", where="--mean and --std", seen=f"{len(mean)} and {len(std)}",
            wanted=f"{len(base.mean)} each",
        )  # fmt: skip
    preprocess = msgspec.structs.replace(base, **given)
    if said is None and not chosen and not {"mean", "std"} <= given.keys():
        notes.append(
            f"Warning: nothing in the checkpoint says how its images were normalized. {_normalized(preprocess)} of "
            f"{origin} is assumed; if that is wrong, accuracy suffers and no check here notices. Give --mean and "
            "--std, or the architecture with --model."
        )
        origin += ", assumed"
    if given:
        flags = ", ".join("--" + field.replace("_", "-") for field in given)
        origin = flags if len(given) == len(fields) else f"{flags}; the rest from {origin}"
    found = Said(read_labels(asked.labels), f"--labels {asked.labels}") if asked.labels is not None else names
    if found is not None and classes is not None and len(found.value) != classes:
        if classes == 0 and asked.labels is None:
            found = None  # transformers writes two default labels into every config
        else:
            raise InputError(
                "the number of labels is not the number of classes" if classes
                else "labels, but the model has no classes",
                where=found.origin, seen=f"{len(found.value)} labels", wanted=str(classes),
                fix="Give a file with one label on each line: --labels FILE." if classes else None,
            )  # fmt: skip
    origins = {"preprocess": origin} | ({"labels": found.origin} if found is not None else {})
    return Inputs(preprocess, found.value if found is not None else None, origins, tuple(notes))


def described(preprocess: Preprocess, labels: list[str] | None, origins: Mapping[str, str]) -> str:
    """Describes preprocessing and labels in one line, with their origins."""
    height, width = preprocess.size
    resized = [math.floor(side / preprocess.crop_pct) for side in preprocess.size]
    if preprocess.crop_mode == "squash":
        steps = f"resize to {resized[0]}×{resized[1]}"
    else:
        steps = f"resize the shorter side to {min(resized)}"
    if preprocess.crop_mode != "squash" or preprocess.crop_pct < 1:
        steps += f", {'border' if preprocess.crop_mode == 'border' else 'center'} crop {height}×{width}"
    known = f"{len(labels)} ({origins.get('labels', 'not recorded where from')})" if labels else "none"
    return (
        f"Preprocessing: {steps}, {preprocess.interpolation}, {_normalized(preprocess)} "
        f"({origins.get('preprocess', 'not recorded where from')}). Labels: {known}."
    )


def _normalized(preprocess: Preprocess) -> str:
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (preprocess.mean, preprocess.std))
    return f"mean {mean}, std {std}"


def of_architecture(name: str) -> Preprocess:
    """timm's preprocessing for an architecture."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    return Preprocess.from_model(cfg.to_dict() if cfg is not None else {})


def preprocess_in(configs: Mapping[str, dict[str, Any]], args: Any, where: object) -> Said | None:
    """The preprocessing given by the files next to the weights, or else by the training script's arguments.

    Args:
        configs: Files by name, see :data:`evit_deploy.models.files.sources.CONFIGS`.
        args: Arguments that a training script saved in the checkpoint, a mapping or a namespace.
        where: The checkpoint, for messages.

    Returns:
        A :class:`~evit_deploy.data.preprocess.Preprocess` with its origin.

    Raises:
        CheckpointError: It is not supported or not understood.
    """
    for name, read in (
        (_PROCESSOR, _of_processor),
        ("config.json", _of_timm),
        ("open_clip_config.json", _of_open_clip),
    ):
        if name in configs:
            try:
                found = read(configs[name])
            except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
                raise CheckpointError(
                    f"its preprocessing cannot be understood: {error}", where=f"{where}/{name}"
                ) from None
            if found is not None:
                return Said(found, name)
    found = _of_args(args if isinstance(args, Mapping) else getattr(args, "__dict__", {}), where)
    return None if found is None else Said(found, "the checkpoint's own arguments")


def labels_in(configs: Mapping[str, dict[str, Any]], where: object) -> Said | None:
    """Class names from a config next to the weights; ``None`` for transformers' default ``LABEL_0`` …

    Raises:
        CheckpointError: They are not names, or some indices are missing.
    """
    config = configs.get("config.json", {})
    place = f"{where}/config.json"
    if isinstance(config.get("id2label"), dict):
        names = _numbered(config["id2label"], place)
        if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
            return None
        return Said(names, "config.json, id2label")
    for holder in (config, config.get("pretrained_cfg")):
        if isinstance(holder, dict) and isinstance(names := holder.get("label_names"), list):
            check_labels(names, f"{place}, label_names")
            return Said(names, "config.json, label_names")
    return None


def _numbered(names: dict[Any, Any], where: str) -> list[str]:
    ordered = [names.get(str(number)) for number in range(len(names))]
    if not ordered or not all(isinstance(name, str) for name in ordered):
        missing = next((n for n, name in enumerate(ordered) if not isinstance(name, str)), 0)
        raise CheckpointError(
            "id2label does not name every class", where=where, seen=f"{len(names)} names, none for {missing}",
            wanted='{"0": name, "1": name, ...}',
        )  # fmt: skip
    return [str(name) for name in ordered]


# ---- Hugging Face transformers


def _of_processor(config: dict[str, Any]) -> Preprocess:
    """Parses an image processor's file of any version: sizes are numbers in old files and mappings in new ones."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    usual = next((value for name, value in _PROCESSORS.items() if kind.startswith(name)), _PROCESSORS["ViT"])
    if not config.get("do_resize", True):
        raise ValueError("images are not resized (do_resize is false), and a model takes one size")
    if config.get("do_pad", False):
        raise ValueError("images are padded (do_pad is true)")
    height, width, shorter = _size(config.get("size") or 224, usual.shorter_side)
    crops = config.get("do_center_crop", usual.crops)
    final = _size(config.get("crop_size") or 224, False)[:2] if crops else (height, width)
    if shorter and not crops:
        raise ValueError("only the shorter side of the image is resized, and a model takes one size")
    number = config.get("resample")
    resample = usual.interpolation if number is None else _filter(number)
    shares = {_crop_share(side, whole) for side, whole in zip(final, (height, width), strict=True)}
    if len(shares) > 1:
        raise ValueError(f"crop_size {final} and size {(height, width)} have different shapes")
    mode = CENTER_FLOOR if shorter else "squash"
    return Preprocess(final, shares.pop(), mode, resample, *_normalization(config, usual))


def _filter(number: Any) -> str:
    if number not in _FILTERS:
        raise ValueError(f"resample is {number!r}, none of PIL's filters 0 to 5")
    return _FILTERS[number]


def _size(size: Any, shorter_by_default: bool) -> tuple[int, int, bool]:
    """Height and width of the resized image, and whether they refer to its shorter side."""
    if isinstance(size, dict):
        if "shortest_edge" in size and set(size) <= {"shortest_edge"}:
            edge = _whole(size["shortest_edge"])
            return edge, edge, True
        return _whole(size["height"]), _whole(size["width"]), False
    if isinstance(size, list | tuple):
        height, width = size
        return _whole(height), _whole(width), False
    return _whole(size), _whole(size), shorter_by_default


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 16:
        raise ValueError(f"{value!r} is not a number of pixels")
    return value


def _crop_share(side: int, whole: int) -> float:
    """The ``crop_pct`` with which timm resizes to exactly this size, ``floor(side / crop_pct)``."""
    if side > whole:
        raise ValueError(f"crop_size {side} is larger than size {whole}")
    share = side / whole
    while math.floor(side / share) < whole:  # correct for rounding
        share = math.nextafter(share, 0)
    return share


def _normalization(config: dict[str, Any], usual: _Processor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation for images scaled to 0..1, converted from the file's scale."""
    mean, std = (0.0,) * 3, (1.0,) * 3
    if config.get("do_normalize", True):
        mean = _numbers(config.get("image_mean"), usual.mean)
        std = _numbers(config.get("image_std"), usual.std)
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    scale = float(factor) * 255
    if not 0 < scale < math.inf:
        raise ValueError(f"rescale_factor is {factor}")
    if abs(scale - 1) < 1e-6:
        return mean, std
    # (f·x − mean) / std on bytes is (x/255 − mean/(255·f)) / (std/(255·f)).
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _numbers(value: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    if value is None:
        return default
    return tuple(float(one) for one in (value if isinstance(value, list | tuple) else [value] * 3))


# ---- timm, OpenCLIP, training scripts


def _of_timm(config: dict[str, Any]) -> Preprocess | None:
    settings = config.get("pretrained_cfg")
    if not isinstance(settings, dict) or "mean" not in settings:
        return None
    known = {name: value for name, value in settings.items() if value is not None}
    return Preprocess.from_model(known)


def _of_open_clip(config: dict[str, Any]) -> Preprocess | None:
    settings, model = config.get("preprocess_cfg"), config.get("model_cfg")
    if not isinstance(settings, dict) or "mean" not in settings:
        return None
    size = settings.get("size") or (model or {}).get("vision_cfg", {}).get("image_size", 224)
    height, width, _ = _size(size, False)
    mode = {"shortest": "center", "squash": "squash"}.get(settings.get("resize_mode", "shortest"))
    if mode is None:
        raise ValueError(f"resize_mode {settings['resize_mode']!r} pads images")
    interpolation = str(settings.get("interpolation", "bicubic"))
    mean, std = (_numbers(settings.get(name), default) for name, default in zip(("mean", "std"), _CLIP, strict=True))
    return Preprocess((height, width), 1.0, mode, interpolation, mean, std)


def _of_args(args: Mapping[str, Any], where: object) -> Preprocess | None:
    """Arguments saved by timm's training script; ``None`` values mean the architecture's default."""
    fields = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    given = {name: args[name] for name in fields if args.get(name) not in (None, "")}
    if not {"mean", "std"} <= given.keys():
        return None
    size = args.get("img_size") or args.get("input_size") or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    try:
        return msgspec.convert(given | {"size": (height, width)}, Preprocess, strict=False)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise CheckpointError(f"its arguments name no preprocessing that can be used: {error}", where=where) from None
