"""Checkpoints: weights with their architecture, image size, classes and token reduction.

``files/sources.py`` locates the files, ``files/safe_weights.py`` reads them without trusting them, ``identify.py``
recognizes the architecture, and ``preprocessing.py`` finds out how images are prepared.
"""

import ast
import reprlib
from pathlib import Path
from typing import Any, Unpack

import msgspec
import torch
from torch import Tensor

from evit_deploy.data.labels import check_labels
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.documents import converted, decode_json
from evit_deploy.errors import CheckpointError, InputError, MissingRequirement
from evit_deploy.files import write_atomically
from evit_deploy.models.create import create_model
from evit_deploy.models.files import hub
from evit_deploy.models.files.prefixes import inside
from evit_deploy.models.files.sources import find_source
from evit_deploy.models.identify import Identity, check_model_name, identify
from evit_deploy.models.layouts.differences import differences_of
from evit_deploy.models.layouts.found import Output, output_of
from evit_deploy.models.layouts.known import SIGNS
from evit_deploy.models.preprocessing import Said, labels_in, preprocess_in, resolve_inputs
from evit_deploy.recipe.options import PreprocessOptions
from evit_deploy.registry import METHODS
from evit_deploy.tokens.backbone import backbone_of, load_backbones
from evit_deploy.tokens.plan import TokenOptions, TokenSpec
from evit_deploy.tokens.reducer import options_of

METADATA_KEY = "evit_deploy"
_FLAGS = {"keep_rate": "--keep-rate", "options": "--method-option"}


class Checkpoint(msgspec.Struct):
    """Weights with their architecture and metadata.

    Args:
        source: Path of a file or folder, ``hf-hub:org/name``, or timm name.
        sha256: Hash of the weights (:attr:`evit_deploy.models.files.sources.Source.digest`); ``None`` for a timm name.
        weights: Tensors under timm's names.
        model: timm architecture.
        model_args: Further arguments of :func:`evit_deploy.models.create.create_model`.
        tokens: The reduction the weights were trained with, if the file records it.
        preprocess: From image to input; ``None`` for the architecture's default.
        labels: Class names, if known.
        notes: Assumptions and choices, shown to the user as warnings.
        method_weights: Tensors of the reduction method's own layers, by name.
        origins: Where ``preprocess`` and ``labels`` come from, as text.
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
    method_weights: dict[str, Tensor] = {}
    origins: dict[str, str] = {}

    @property
    def output(self) -> Output:
        """The model's output: one number per class or, without classes, a vector for comparing images."""
        return output_of(self.model_args)


def resolve_tokens(checkpoint: Checkpoint, **asked: Unpack[TokenOptions]) -> tuple[TokenSpec, list[str]]:
    """Combines the requested reduction with the one that the checkpoint was trained with.

    Args:
        checkpoint: The checkpoint.
        asked: Fields of the spec; others come from the checkpoint, then from the defaults.

    Returns:
        The spec, and notes on values of the checkpoint that were overridden.

    Raises:
        InputError: There is no keep rate, or the values contradict each other.
    """
    unknown = next((name for name in asked if name not in TokenOptions.__annotations__), None)
    if unknown is not None:
        raise TypeError(f"unexpected keyword argument {unknown!r}")
    own = checkpoint.tokens
    values: dict[str, Any] = dict(asked)
    if "method_options" in values:
        values["options"] = values.pop("method_options")
    method = METHODS.get(values.get("method", own.method if own else "evit"))
    if own is not None and values.get("method", own.method) != own.method and not method.comparison_only:
        raise InputError(
            f"this checkpoint was trained with the method {own.method!r}", where="--method", seen=values["method"],
            wanted=own.method, fix="Leave --method out, or take dense weights.",
        )  # fmt: skip
    same = own is not None and values.get("method", own.method) == own.method
    if "options" in values and own is not None and same:
        values["options"] = own.options | values["options"]
    name = values.get("method", own.method if own else "evit")
    options_of(method, TokenSpec(method=name, options=values.get("options", own.options if own and same else {})))
    if values.get("fuse") and not method.fuses:
        raise InputError(f"the method {name!r} has no fused token", where="--fuse", fix="Leave --fuse out.")
    given = "keep_rate" in values or (own is not None and own.keep_rate is not None)
    if method.takes_keep_rate and not given and method.default_keep_rate is not None:
        values["keep_rate"], given = method.default_keep_rate, True
    if method.takes_keep_rate and not given:
        raise InputError(
            "a keep rate is needed: the checkpoint does not contain one", where="--keep-rate",
            wanted="a number in (0, 1]", fix="Give for example --keep-rate 0.7.",
        )  # fmt: skip
    if not method.fuses:
        values["fuse"] = False
    base: dict[str, Any] = msgspec.structs.asdict(own) if own else {}
    if own is not None and values.get("method", own.method) != own.method:
        base["options"] = {}  # options of another method do not apply
    notes = [
        f"{_FLAGS.get(name, '--' + name)}: {value} replaces the checkpoint's own {base[name]}"
        for name, value in values.items()
        if base.get(name) not in (None, value, {})
    ]
    return TokenSpec(**(base | values)), notes


def read_checkpoint(
    source: str | Path, model: str | None = None, preprocess: PreprocessOptions | None = None
) -> Checkpoint:
    """Reads a checkpoint, or downloads the pretrained weights of a timm name.

    Args:
        source: ``.pth``, ``.pt``, ``.pth.tar``, ``.ckpt``, ``.bin`` or ``.safetensors`` file; a folder saved by Hugging
            Face, timm or OpenCLIP; ``hf-hub:org/name`` or ``org/name``, from the local cache if possible; or a timm
            name. ``weights.pth#teacher`` selects the model whose names begin with ``teacher`` in a file with several
            models.
        model: timm name of the architecture; by default it is identified from the tensors.
        preprocess: Preprocessing and labels that override the checkpoint's.

    Raises:
        CheckpointError: The file cannot be read as weights, holds weights that are not finite, fits no model, or
            contradicts the configuration next to it.
        InputError: The source is neither a file nor a timm name, ``model`` is unknown, or the labels do not fit the
            classes.
        MissingRequirement: The weights cannot be downloaded.
    """
    found, asked = find_source(source), preprocess or PreprocessOptions()
    if found is None:
        return _from_timm(str(source), model, asked)
    weights, where = found.read(), found.path
    own = _own_metadata(where, weights.metadata[METADATA_KEY]) if METADATA_KEY in weights.metadata else None
    held = inside(where, weights.tensors, SIGNS)
    tensors, method_weights = _split(held.weights, own.tokens.method if own and own.tokens else None)
    if own is not None and model is None:
        identity = Identity(own.model, own.model_args, tensors, [])
    else:
        held = msgspec.structs.replace(held, weights=tensors)
        identity = identify(where, held, model, method_weights, found.config)
    said = Said(own.preprocess, "the checkpoint") if own else preprocess_in(found.configs, weights.args, where)
    if said is None and identity.preprocess is not None and model is None:
        said = Said(identity.preprocess, "that of all weights with these names")
    names = Said(own.labels, "the checkpoint") if own and own.labels else labels_in(found.configs, where)
    classes = identity.model_args.get("num_classes")
    inputs = resolve_inputs(identity.model, classes, said, names, asked, chosen=model is not None or identity.prepared)
    return Checkpoint(
        source=found.name,
        sha256=found.digest,
        weights=identity.weights,
        model=identity.model,
        model_args=identity.model_args,
        tokens=own.tokens if own else identity.tokens or _tokens_of_args(where, weights.args, method_weights),
        preprocess=inputs.preprocess,
        labels=inputs.labels,
        notes=[*found.notes, *weights.notes, *identity.notes, *inputs.notes],
        method_weights=method_weights,
        origins=inputs.origins,
    )


def _split(tensors: dict[str, Tensor], method: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits tensors into the model's and those of methods' own layers; ``method`` may come from another package."""
    names = {*METHODS.own_names(), *({method} & set(METHODS.names()) if method else ())}
    prefixes = tuple(prefix for name in sorted(names) for prefix in METHODS.get(name).own_parameters)
    own = {name: value for name, value in tensors.items() if name.startswith(prefixes)}
    return {name: value for name, value in tensors.items() if name not in own}, own


def build_model(checkpoint: Checkpoint, image_size: int | None = None) -> torch.nn.Module:
    """Builds the dense model and loads the weights strictly; a method's own weights are stored for later use.

    Args:
        checkpoint: What to build.
        image_size: Side in pixels, if it differs from the checkpoint's; the position embedding is resampled as in timm.

    Returns:
        The model in evaluation mode, FP32.

    Raises:
        CheckpointError: The weights do not fit the architecture.
        InputError: The patch size does not divide the image size.
    """
    load_backbones()
    try:
        with torch.device("meta"):  # a mismatching model could use much memory before it is refused
            wanted = create_model(checkpoint.model, checkpoint.model_args).state_dict()
        differences = differences_of(wanted, checkpoint.weights)
        model = None if differences else create_model(checkpoint.model, checkpoint.model_args)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise CheckpointError(
            f"timm cannot build {checkpoint.model!r} with {checkpoint.model_args}: {error}", where=checkpoint.source
        ) from error
    if model is None:
        raise CheckpointError(
            "the weights do not fit the architecture",
            where=checkpoint.source,
            seen=differences,
            wanted=f"the tensors of {checkpoint.model}",
            fix="Name the right architecture with --model.",
        )
    model.load_state_dict(checkpoint.weights)
    if checkpoint.method_weights:
        model.method_weights = checkpoint.method_weights  # type: ignore[assignment]  # a plain attribute
    if image_size is not None:
        set_image_size_(model, image_size)
    return model.eval()


def preprocess_of(checkpoint: Checkpoint, model: torch.nn.Module) -> Preprocess:
    """The checkpoint's preprocessing at the model's image size; timm's if the checkpoint has none."""
    own = checkpoint.preprocess
    size = backbone_of(model).image_size(model)
    if own is None:
        return Preprocess.from_model(model, size)
    if len(own.mean) not in (1, 3):  # for any number of channels: see evit_deploy.data.images.with_channels
        raise InputError(
            "normalization needs three channels", where="--mean and --std", seen=len(own.mean),
            wanted="three numbers, or one for all",
        )  # fmt: skip
    return msgspec.structs.replace(own, size=size)


def set_image_size_(model: Any, image_size: int) -> None:
    """Changes a model's image size in place.

    Raises:
        InputError: The patch size does not divide it, it needs too much memory, or the model has a fixed size.
    """
    if not hasattr(model, "set_input_size"):
        size = backbone_of(model).image_size(model)[0]
        if image_size == size:
            return
        raise InputError(
            f"a {type(model).__name__} takes one image size alone", where="--image-size", seen=image_size, wanted=size
        )
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
        try:
            model.set_input_size(img_size=(image_size, image_size))
        # PyTorch's errors for tensors that do not fit in memory
        except (RuntimeError, OverflowError, MemoryError) as error:
            raise InputError("the image size is too large for memory", where="--image-size", seen=image_size) from error


def _from_timm(name: str, model: str | None, asked: PreprocessOptions) -> Checkpoint:
    import timm

    if model is not None and model != name:
        raise InputError(
            "a timm name already says which model it is",
            where="--model",
            seen=model,
            fix=f"Leave out --model or {name!r}.",
        )
    check_model_name(name, where="CHECKPOINT", also="an existing checkpoint file")
    if not timm.is_model_pretrained(name):
        raise MissingRequirement(
            f"no weights can be downloaded for the name {name!r}",
            fix=f"Download a checkpoint and give its path with --model {name}.",
        )
    fix = f"Connect to the network once, or download the checkpoint and give its path with --model {name}."
    cfg: Any = timm.get_pretrained_cfg(name)
    repository = hub.repository_of(cfg.hf_hub_id) if cfg is not None and cfg.hf_hub_id else None
    why_not = "" if repository is not None and hub.cached(repository) is not None else hub.unreachable()
    if why_not:
        raise MissingRequirement(
            f"the pretrained weights of {name!r} are not in the hub's cache, and the Hugging Face hub does not answer "
            f"({why_not})",
            fix=fix,
        )
    try:
        pretrained = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network and cache raise their own classes
        what = f"the pretrained weights of {name!r} could not be fetched ({type(error).__name__})"
        raise MissingRequirement(what, fix=fix) from error
    cfg = pretrained.pretrained_cfg
    size, classes = cfg["input_size"][1], cfg["num_classes"]
    said = Said(Preprocess.from_model(pretrained, size), f"timm's {name}")
    inputs = resolve_inputs(name, classes, said, _imagenet_labels(cfg), asked)
    return Checkpoint(
        source=name,
        sha256=None,
        weights=pretrained.state_dict(),
        model=name,
        model_args={"num_classes": classes, "img_size": size},
        preprocess=inputs.preprocess,
        labels=inputs.labels,
        notes=list(inputs.notes),
        origins=inputs.origins,
    )


def _imagenet_labels(cfg: Any) -> Said | None:
    """ImageNet's class names, if timm records that the weights were trained on it."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(cfg)
    if not subset:
        return None
    return Said(ImageNetInfo(subset).label_descriptions(), f"timm's {subset}")


_FORMAT = 1


class _OwnMetadata(msgspec.Struct):
    format: int
    model: str
    model_args: dict[str, Any]
    preprocess: Preprocess
    labels: list[str] | None
    tokens: TokenSpec | None


def _own_metadata(path: Path, text: str) -> _OwnMetadata:
    where = f"{path}: {METADATA_KEY} metadata"
    content = decode_json(text, dict[str, Any], where, error=CheckpointError)
    if content.get("format") != _FORMAT:
        raise CheckpointError(
            "metadata of a format that is not known", where=where, seen=reprlib.repr(content.get("format")),
            wanted=_FORMAT, fix="Use the version of evit-deploy that wrote it, or a newer one.",
        )  # fmt: skip
    own = converted(content, _OwnMetadata, where, CheckpointError)
    if own.labels is not None:
        check_labels(own.labels, where)
    try:
        check_model_name(own.model, where=where)
    except InputError as error:
        raise CheckpointError(error.what, where=where, seen=error.seen, wanted=error.wanted, fix=error.fix) from None
    return own


def save_checkpoint(path: Path, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Writes weights with all metadata that :func:`read_checkpoint` needs, atomically.

    Args:
        path: ``.safetensors`` file.
        model: Its ``state_dict`` is written.
        checkpoint: Everything except the weights.
    """
    from safetensors.torch import save

    assert checkpoint.preprocess is not None
    own = _OwnMetadata(
        format=_FORMAT,
        model=checkpoint.model,
        model_args=checkpoint.model_args,
        preprocess=checkpoint.preprocess,
        labels=checkpoint.labels,
        tokens=checkpoint.tokens,
    )
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(weights, metadata={METADATA_KEY: msgspec.json.encode(own).decode()}))


def _tokens_of_args(path: Path, args: Any, method_weights: dict[str, Tensor]) -> TokenSpec | None:
    """The reduction recorded by a third-party training script: EViT's ``base_keep_rate``, ``drop_loc`` (text such as
    ``(3, 6, 9)``) and ``fuse_token``, or DynamicViT's ``base_rate``, which may be missing."""
    values = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    if any(name.startswith("score_predictor.") for name in method_weights):
        try:
            rate = values.get("base_rate")
            rate = None if rate is None else float(rate)
            return TokenSpec(keep_rate=rate, fuse=False, method="dynamicvit")
        except (ValueError, TypeError) as error:
            raise _senseless(path, "DynamicViT", {"base_rate": values.get("base_rate")}, error) from None
    if "base_keep_rate" not in values:
        return None
    try:
        locations = values.get("drop_loc", "(3, 6, 9)")
        if isinstance(locations, str):
            if len(locations) > 1000:  # the parser runs out of memory or stack on some longer ones
                raise ValueError("drop_loc is too long for a list of blocks")
            locations = ast.literal_eval(locations)
        locations = (locations,) if isinstance(locations, int) else tuple(locations)
        rate = values["base_keep_rate"]
        rate = tuple(map(float, rate)) if isinstance(rate, list | tuple) else float(rate)
        return TokenSpec(keep_rate=rate, locations=locations, fuse=bool(values.get("fuse_token", False)))
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        seen = {name: values.get(name) for name in ("base_keep_rate", "drop_loc", "fuse_token")}
        raise _senseless(path, "EViT", seen, error) from None


def _senseless(path: Path, method: str, seen: dict[str, Any], error: Exception) -> CheckpointError:
    what = f"its {method} arguments make no sense: {str(error)[:200]}"
    return CheckpointError(what, where=path, seen=reprlib.repr(seen))
