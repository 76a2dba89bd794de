"""Models that can be shown: a bundle on one or several runtimes, or a checkpoint reduced in PyTorch."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import MANIFEST
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError
from evit_deploy.export.card import EMBEDDING
from evit_deploy.inference.choice import asked_for
from evit_deploy.inference.model import checked_bundle, load
from evit_deploy.models.checkpoint import build_model, preprocess_of, read_checkpoint, resolve_tokens
from evit_deploy.registry import METHODS, RUNTIMES
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import TokenOptions, TokenPlan
from evit_deploy.tokens.reduce import reduce_tokens_, token_label, token_plan, token_spec
from evit_deploy.tokens.reducer import TokenReducer
from evit_deploy.visualization.tellers import File, Opened, PyTorch, Teller

_LOG = logging.getLogger(__name__)
_EAGER = "eager"


class Subject(msgspec.Struct, frozen=True):
    """An opened model that can be shown.

    Args:
        name: Base name of its output files.
        about: Short description: model, method and precision.
        plan: Its token plan.
        method: Its method.
        preprocess: From image to input.
        shape: Input shape for one image, ``(C, H, W)``.
        labels: Class names, if known.
        classes: Whether its output is classes.
        tellers: The runtimes to query; the picture shows the first.
        scorer: Source of the scores, if the first runtime does not return them.
    """

    name: str
    about: str
    plan: TokenPlan
    method: type[TokenReducer]
    preprocess: Preprocess
    shape: tuple[int, ...]
    labels: list[str] | None
    classes: bool
    tellers: tuple[Teller, ...]
    scorer: Teller | None = None


def is_bundle(source: str | Path) -> bool:
    """Whether a path is a bundle's folder."""
    return Path(source, MANIFEST).is_file()


def name_of(source: str | Path) -> str:
    """Base name of output files for a bundle or a checkpoint: the name of its folder, file or hub repository."""
    file = Path(str(source).partition("#")[0])
    if file.is_dir():
        return file.resolve().name
    return file.stem if file.is_file() else str(source).strip("/").replace("/", "-").replace(":", "-")


def subject_of_model(model: Any, preprocess: Preprocess, labels: list[str] | None = None, name: str = "") -> Subject:
    """Prepares a PyTorch model without changing it.

    Args:
        model: A reduced model.
        preprocess: From image to input.
        labels: Class names, if known.
        name: Its name.

    Raises:
        InputError: The model keeps every patch.
        UnsupportedModelError: No backbone supports the model.
    """
    plan, spec, backbone = token_plan(model), token_spec(model), backbone_of(model)
    _check(plan, name or type(model).__name__)
    about = ", ".join(text for text in (name, token_label(spec)) if text)
    shape = (backbone.channels(model), *backbone.image_size(model))
    classes = bool(getattr(model, "num_classes", 0))
    method = METHODS.get(spec.method)
    return Subject(name, about, plan, method, preprocess, shape, labels, classes, (PyTorch(model),))


@contextlib.contextmanager
def opened_checkpoint(source: str | Path, model: str | None, tokens: TokenOptions) -> Iterator[Subject]:
    """Opens a checkpoint and reduces its tokens.

    Args:
        source: See :func:`~evit_deploy.models.checkpoint.read_checkpoint`.
        model: timm name of the architecture.
        tokens: Fields of the spec; others come from the checkpoint.

    Raises:
        InputError: The checkpoint cannot be used, or keeps every patch.
    """
    checkpoint = read_checkpoint(source, model)
    spec, notes = resolve_tokens(checkpoint, **tokens)
    for note in (*checkpoint.notes, *notes):
        _LOG.warning(note)
    built = reduce_tokens_(build_model(checkpoint), spec)
    preprocess, labels = preprocess_of(checkpoint, built), checkpoint.labels
    checkpoint.weights = {}
    built = built.to("cuda") if torch.cuda.is_available() else built
    subject = subject_of_model(built, preprocess, labels, checkpoint.model)
    yield msgspec.structs.replace(subject, name=name_of(source))


@contextlib.contextmanager
def opened_bundle(
    path: str | Path, runtimes: Sequence[str], against: str | Path | None, threads: int | None
) -> Iterator[Subject]:
    """Opens a bundle on runtimes.

    Args:
        path: The bundle.
        runtimes: Runtimes to query; by default ONNX Runtime, or PyTorch if that cannot run the file.
        against: See :func:`~evit_deploy.inference.model.load`.
        threads: CPU threads.

    Raises:
        InputError: The model keeps every patch, a runtime cannot run it, or see
            :func:`~evit_deploy.inference.model.load`.
        MissingRequirement: See :func:`~evit_deploy.inference.model.load`.
    """
    bundle = checked_bundle(path)
    manifest = bundle.manifest
    _check(manifest.plan, path)
    reasons = File.unusable(bundle)
    names = list(dict.fromkeys(runtimes)) or [_EAGER if reasons or against else OnnxRuntimeRunner.name]
    if against is not None and all(RUNTIMES.get(name).files for name in names):
        raise InputError("only PyTorch's runtimes use a checkpoint", where="against", fix="Use the runtime eager too.")
    with contextlib.ExitStack() as stack:
        found = [_teller(bundle, name, against, threads, stack) for name in names]
        scorer = None
        if not isinstance(found[0], File) and not reasons:
            scorer = next((one for one in found if isinstance(one, File)), None)
            if scorer is None:
                scorer = File(bundle, threads)
                stack.callback(scorer.close)
        elif not isinstance(found[0], File | PyTorch):
            _LOG.warning(f"There are no heat maps: ONNX Runtime cannot run the file ({'; '.join(reasons)}).")
        yield Subject(
            name=name_of(bundle.path),
            about=f"{manifest.model}, {token_label(manifest.tokens)}, {manifest.precision}",
            plan=manifest.plan,
            method=METHODS.get(manifest.tokens.method),
            preprocess=manifest.preprocess,
            shape=tuple(int(size or 0) for size in manifest.inputs[0].shape[1:]),
            labels=manifest.labels,
            classes=manifest.answer != EMBEDDING,
            tellers=tuple(found),
            scorer=scorer,
        )


def _teller(
    bundle: Bundle, name: str, against: str | Path | None, threads: int | None, stack: contextlib.ExitStack
) -> Teller:
    """Opens one runtime until the exit stack closes."""
    if name == _EAGER:
        return PyTorch(asked_for(bundle, name, Path(against) if against is not None else None))
    if name == OnnxRuntimeRunner.name and not File.unusable(bundle):
        teller = File(bundle, threads)
    else:
        own = against if not RUNTIMES.get(name).files else None
        teller = Opened(load(bundle.path, name, threads=threads, against=own))
    stack.callback(teller.close)
    return teller


def _check(plan: TokenPlan, where: object) -> None:
    if not plan.locations:
        raise InputError(
            "it keeps every patch: there is nothing to show", where=where,
            fix="Show a bundle that was converted with a keep rate below 1, or give --keep-rate.",
        )  # fmt: skip
