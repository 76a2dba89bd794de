"""Shows the patches that a model keeps, fuses and merges, from PyTorch or from a bundle's runtimes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import msgspec
import numpy as np
from PIL import Image

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.drawing.seen import Seen, Stage, grid_of
from evit_deploy.drawing.sheet import Sheet
from evit_deploy.drawing.tiles import SIDE
from evit_deploy.errors import InputError
from evit_deploy.inference.inputs import Given, ImageLike
from evit_deploy.inference.prediction import predictions_of
from evit_deploy.tokens.plan import TokenOptions, TokenPlan
from evit_deploy.visualization.stages import stages_of
from evit_deploy.visualization.subject import Subject, is_bundle, opened_bundle, opened_checkpoint, subject_of_model

PAGE = 16
"""Images per sheet."""
_COLUMNS = 4
"""Default number of locations per sheet; ToMe has one in every block."""


class Shown(msgspec.Struct, frozen=True, eq=False):
    """What a model did with images; displayed as a picture in notebooks.

    Args:
        images: The images that could be read, with their stages.
        about: Short description of the model.
        runtime: Runtime that ran it; not in the picture, which is the same for all.
        scores: Name of the scores in the heat maps.
        legend: Meaning of pale patches and colors.
        blocks: Locations to draw; the images contain all of them.
        differences: Sentences on choices of further runtimes that differ; empty if all agree.
    """

    images: tuple[Seen, ...]
    about: str
    runtime: str
    scores: str
    legend: str
    blocks: tuple[int, ...]
    differences: tuple[str, ...] = ()

    def sheet(self, *, heat: bool = True, side: int = SIDE) -> Sheet:
        """The picture, laid out.

        Args:
            heat: Whether to draw the scores too.
            side: Longer side of an image in pixels; rounded down to whole patches.

        Raises:
            InputError: No image could be read.
        """
        chosen = [
            msgspec.structs.replace(one, stages=tuple(stage for stage in one.stages if stage.block in self.blocks))
            for one in self.images
        ]
        below = f" Below: {self.scores}, the score they are ranked by." if heat and _scored(chosen) else ""
        return Sheet(chosen, f"{self.about}. {self.legend}{below}", self.scores if heat else "", side)

    def picture(self) -> Image.Image:
        """The picture in memory, with all images on one sheet."""
        return self.sheet().image()

    def _repr_png_(self) -> bytes | None:
        return self.sheet().png() if 0 < len(self.images) <= PAGE else None

    def __repr__(self) -> str:
        return (
            f"Shown({len(self.images)} images, blocks {', '.join(map(str, self.blocks))}: {self.about}, {self.runtime})"
        )


def show(
    source: str | Path | Any,
    images: ImageLike | Iterable[ImageLike],
    *,
    runtimes: Sequence[str] = (),
    blocks: Sequence[int] = (),
    against: str | Path | None = None,
    model: str | None = None,
    preprocess: Preprocess | None = None,
    **tokens: Unpack[TokenOptions],
) -> Shown:
    """Shows the patches that a model keeps, fuses and merges at each location.

    Args:
        source: A bundle, a checkpoint accepted by :func:`~evit_deploy.models.checkpoint.read_checkpoint`, or a reduced
            PyTorch model.
        images: One or several images, as accepted by :class:`~evit_deploy.inference.model.Model`.
        runtimes: Runtimes for a bundle; by default ONNX Runtime, or PyTorch (``eager``) if that cannot run the file.
            The first one is drawn, and the others are compared with it.
        blocks: Locations to draw; by default all, or four if there are more.
        against: Current path of the bundle's checkpoint, for ``eager``, if it was moved.
        model: For a checkpoint: timm name of the architecture.
        preprocess: For a PyTorch model: from image to input; by default timm's.
        tokens: For a checkpoint: fields of the spec; others come from the checkpoint.

    Returns:
        What the model did with each image.

    Raises:
        InputError: The source or an image cannot be used, the model keeps every patch, or a block is not a location.
        MissingRequirement: A runtime is not installed here.
        StageError: A runtime failed.
    """
    with opened(source, runtimes, against, model=model, preprocess=preprocess, tokens=tokens) as subject:
        given = Given(images, subject.preprocess, subject.shape)
        return look(subject, given, 0, len(given), blocks=blocks)


@contextlib.contextmanager
def opened(
    source: str | Path | Any,
    runtimes: Sequence[str] = (),
    against: str | Path | None = None,
    *,
    threads: int | None = None,
    model: str | None = None,
    preprocess: Preprocess | None = None,
    tokens: TokenOptions | None = None,
) -> Iterator[Subject]:
    """Opens a source of any kind; see :func:`show`.

    Raises:
        InputError: It cannot be used, or an argument does not apply to it.
    """
    file = isinstance(source, str | Path)
    bundle = file and is_bundle(source)
    architecture: dict[str, Any] = {"model": model, **(tokens or {})}
    asked: dict[str, Any] = {"runtimes": tuple(runtimes), "against": against}
    if tuple(runtimes) == ("eager",):
        asked.pop("runtimes")
    if bundle:
        _refuse("a bundle is shown as it is", architecture | {"preprocess": preprocess})
    elif file:
        _refuse("a checkpoint runs in PyTorch alone", asked | {"preprocess": preprocess}, "Convert it, and show that.")
    else:
        _refuse("a model is shown as it is", architecture | asked)
    if bundle:
        with opened_bundle(source, runtimes, against, threads) as subject:
            yield subject
    elif file:
        with opened_checkpoint(source, model, tokens or {}) as subject:
            yield subject
    else:
        yield subject_of_model(source, preprocess or Preprocess.from_model(source), name=type(source).__name__)


def _refuse(what: str, arguments: dict[str, Any], fix: str | None = None) -> None:
    """Refuses arguments that do not apply to the source.

    Raises:
        InputError: One was given.
    """
    given = {name: value for name, value in arguments.items() if value not in (None, ())}
    if given:
        name, value = next(iter(given.items()))
        raise InputError(what, where=name, seen=value, fix=fix or f"Leave {' and '.join(given)} out.")


def look(
    subject: Subject,
    given: Given,
    start: int,
    stop: int,
    *,
    blocks: Sequence[int] = (),
    on_error: Callable[[int, InputError], None] | None = None,
) -> Shown:
    """Runs a range of the images.

    Args:
        subject: The opened model.
        given: The images.
        start: Index of the first image.
        stop: Index after the last image.
        blocks: See :func:`show`.
        on_error: Called with the index of an unreadable image and the error; the image is left out. Without it, the
            first unreadable image raises.

    Raises:
        InputError: An image cannot be read, or a block is not a location.
        StageError: A runtime failed.
    """
    chosen = blocks_to_draw(subject.plan, blocks)
    images, unusable = given.prepared(start, stop)
    for number, error in unusable.items():
        if on_error is None:
            raise error
        on_error(number, error)
    names = [given.name(number) or f"image {number}" for number in range(start, stop) if number not in unusable]
    seen, differences = see(subject, images, names) if names else ([], [])
    return Shown(
        images=tuple(seen),
        about=subject.about,
        runtime=subject.tellers[0].runtime,
        scores=subject.method.score_name,
        legend=legend(subject.plan),
        blocks=chosen,
        differences=tuple(differences),
    )


def see(subject: Subject, images: np.ndarray, names: Sequence[str]) -> tuple[list[Seen], list[str]]:
    """Runs prepared images.

    Args:
        subject: The opened model.
        images: float32 ``[n, C, H, W]``, at least one.
        names: Their names.

    Returns:
        The images with their stages, and a sentence for each further runtime whose choices differ.

    Raises:
        StageError: A runtime failed.
    """
    grid = grid_of(images.shape[2], images.shape[3], subject.plan.patches)

    def stages(choices: list[np.ndarray], scores: list[Any]) -> list[tuple[Stage, ...]]:
        return stages_of(choices, subject.plan, grid, subject.method, scores)

    told = subject.tellers[0].tell(images)
    found = stages(told.choices, told.scores)
    others = {teller.runtime: teller for teller in subject.tellers[1:]}
    if subject.scorer is not None:
        others.setdefault(subject.scorer.runtime, subject.scorer)
    differences = []
    for runtime, teller in others.items():
        other = teller.tell(images)
        theirs = stages(other.choices, other.scores)
        differences += _difference((subject.tellers[0].runtime, found), (runtime, theirs), names)
        # the heat map always uses the file's scores, so that pictures are the same for all runtimes
        if teller is subject.scorer:
            found = [_scored_by(*pair) for pair in zip(found, theirs, strict=True)]
    captions = [""] * len(names)
    if subject.classes:
        best = predictions_of(told.answers, subject.labels, 1, list(names))
        kind = "" if subject.labels is not None else "class "
        captions = [f"{kind}{one.label} {100 * one.probability:.1f} %" for one in best]
    pictures = _pictures(images, subject.preprocess)
    return [
        Seen(picture, grid, one, name, caption)
        for picture, one, name, caption in zip(pictures, found, names, captions, strict=True)
    ], differences


def legend(plan: TokenPlan) -> str:
    """Explains pale patches and colors in one or more sentences."""
    said = {
        "merged": "Patches that were merged into one token have one color and a line around them.",
        "fused": "Pale patches were fused, those of one color into one token.",
        "updated": "Pale patches wait for the next stage, and are not updated.",
        "dropped": "Pale patches were dropped.",
    }
    kinds = {
        "merged" if row.choice == "merge" else "updated" if row.aside else "fused" if row.fused else "dropped"
        for row in plan.locations
    }
    return " ".join(text for kind, text in said.items() if kind in kinds)


def blocks_to_draw(plan: TokenPlan, asked: Sequence[int]) -> tuple[int, ...]:
    """The locations to draw: the requested ones, or else all, or four including the last if there are more.

    Raises:
        InputError: A block is not a location.
    """
    blocks = [row.block for row in plan.locations]
    strange = next((block for block in asked if block not in blocks), None)
    if strange is not None:
        raise InputError(
            "this block reduces no tokens",
            where="blocks",
            seen=strange,
            wanted="some of " + ", ".join(map(str, blocks)),
        )
    if asked or len(blocks) <= _COLUMNS:
        return tuple(sorted(set(asked))) or tuple(blocks)
    step = len(blocks) / _COLUMNS
    return tuple(blocks[round(step * (number + 1)) - 1] for number in range(_COLUMNS))


def _scored(images: Sequence[Seen]) -> bool:
    return any(stage.scores is not None for one in images for stage in one.stages)


def _scored_by(own: Sequence[Stage], others: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(msgspec.structs.replace(one, scores=other.scores) for one, other in zip(own, others, strict=True))


def _difference(
    one: tuple[str, list[tuple[Stage, ...]]], other: tuple[str, list[tuple[Stage, ...]]], names: Sequence[str]
) -> list[str]:
    """A sentence on the choices in which two runtimes differ; empty if they agree."""
    unlike = [
        (number, mine.block)
        for number, (own, theirs) in enumerate(zip(one[1], other[1], strict=True))
        for mine, yours in zip(own, theirs, strict=True)
        if not mine.equals(yours)
    ]
    if not unlike:
        return []
    number, block = unlike[0]
    count = len({image for image, _ in unlike})
    first = f"the first at block {block} of {names[number]}"
    return [f"{one[0]} and {other[0]} choose other patches in {count} of {len(names)} images, {first}."]


def _pictures(images: np.ndarray, preprocess: Preprocess) -> list[np.ndarray]:
    """Converts normalized inputs back to images, uint8 ``[H, W, 3]``."""
    mean, std = (np.array(values, np.float64) for values in (preprocess.mean, preprocess.std))
    if images.shape[1] < 3:  # gray: the mean of normalized colors
        images, mean, std = images.mean(axis=1, keepdims=True).repeat(3, axis=1), mean.mean(), std.mean()
    colors = images[:, :3].transpose(0, 2, 3, 1) * std + mean
    return list(np.rint(np.clip(colors, 0, 1) * 255).astype(np.uint8))
