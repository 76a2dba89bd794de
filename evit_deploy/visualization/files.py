"""Writes pictures atomically, in sheets of up to :data:`~evit_deploy.visualization.show.PAGE` images each."""

import logging
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from evit_deploy import progress
from evit_deploy.drawing.seen import Seen, Stage, title_of
from evit_deploy.drawing.sheet import Sheet
from evit_deploy.drawing.tiles import SIDE
from evit_deploy.errors import GateFailed, InputError, first_few
from evit_deploy.files import write_atomically
from evit_deploy.inference.files import Unreadable
from evit_deploy.inference.inputs import Given, image_paths
from evit_deploy.visualization.curve import RemovalCurve
from evit_deploy.visualization.show import PAGE, blocks_to_draw, look
from evit_deploy.visualization.subject import Subject, name_of

_LOG = logging.getLogger(__name__)
SUFFIXES = (".png", ".svg")


class ShownStage(msgspec.Struct, frozen=True):
    """The patches of one image after one location, as numbers.

    Args:
        block: 0-based block.
        does: ``kept``, ``merged``, or ``updated`` if the others wait.
        count: Number of kept patches; of tokens for merging methods.
        patches: Total number of patches.
        kept: Indices of the kept patches, row by row from the top left; empty for merging methods.
        tokens: The patches of each token that contains several.
    """

    block: int
    does: str
    count: int
    patches: int
    kept: list[int]
    tokens: list[list[int]]


class ShownImage(msgspec.Struct, frozen=True):
    """One image.

    Args:
        image: Path of its file.
        answer: The model's answer as a short text.
        stages: Its locations.
    """

    image: str
    answer: str
    stages: list[ShownStage]


class ShownFiles(msgspec.Struct, frozen=True):
    """The pictures that were written, with their data.

    Args:
        about: Short description of the model.
        runtimes: The runtimes that were queried; the pictures show the first.
        pictures: The written files.
        grid: Rows and columns of patches.
        images: The images that could be read, with all locations, including those not drawn.
        unreadable: Images that could not be read.
        differences: Sentences on choices of further runtimes that differ.
    """

    about: str
    runtimes: list[str]
    pictures: list[str]
    grid: tuple[int, int] | None
    images: list[ShownImage]
    unreadable: list[Unreadable]
    differences: list[str]

    def summary(self) -> list[str]:
        """Lines for the terminal: how much is kept, and the files."""
        lines = []
        if self.images:
            lines.append(f"{self.about}, {self.runtimes[0]}, {len(self.images)} image{'s' * (len(self.images) != 1)}.")
            stages = zip(*(one.stages for one in self.images), strict=True)
            lines += [f"  {title_of(one)}" for one in stages]
        if len(self.runtimes) > 1 and self.images and not self.differences:
            lines.append(f"{' and '.join(self.runtimes)} choose the same patches in all {len(self.images)} images.")
        return [*lines, *self.pictures]

    def raise_if_unreadable(self) -> None:
        """Raises if an image could not be read.

        Raises:
            GateFailed: An image could not be read.
        """
        if self.unreadable:
            raise GateFailed(
                f"{len(self.unreadable)} of {len(self.images) + len(self.unreadable)} images cannot be read",
                seen=first_few(one.image for one in self.unreadable),
                fix="Those that can be were drawn." if self.images else None,
            )


def picture_files(out: Path, images: int) -> list[Path]:
    """Paths of the sheets for this number of images: ``out``, or ``out`` with numbers."""
    pages = -(-images // PAGE)
    if pages <= 1:
        return [out]
    return [out.with_name(f"{out.stem}-{page + 1:0{len(str(pages))}}{out.suffix}") for page in range(pages)]


def check_out(files: Iterable[Path], *, force: bool, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Checks, before any work, that files can be written.

    Args:
        files: Paths to write.
        force: Whether to replace existing files.
        suffixes: Accepted file extensions.

    Raises:
        InputError: A path is a folder, exists already, has another extension, or is not writable.
    """
    for file in files:
        if file.is_dir():
            raise InputError("this is a folder", where=file, wanted="a file")
        if file.suffix.lower() not in suffixes:
            raise InputError(
                "unknown file extension", where=file, seen=file.suffix or "none",
                wanted=" or ".join(suffixes), fix=f"Say --out {shlex.quote(str(file.with_suffix(suffixes[0])))}.",
            )  # fmt: skip
        if os.path.lexists(file) and not force:
            raise InputError("it exists already", where=file, fix="Give --force to replace it, or another --out.")
        if not file.parent.is_dir():
            raise InputError("its folder is not there", where=file, seen=file.parent)
        if not os.access(file.parent, os.W_OK):
            raise InputError("cannot write there", where=file.parent, fix="Give another --out.")


def draw_files(
    subject: Subject,
    paths: Iterable[str | Path],
    *,
    blocks: Sequence[int] = (),
    heat: bool = True,
    side: int = SIDE,
    out: Path | None = None,
    force: bool = False,
) -> ShownFiles:
    """Draws images to files, sheet by sheet, so that memory does not grow with their number.

    Args:
        subject: The opened model.
        paths: Files, and folders, which are searched recursively.
        blocks: Locations to draw; by default all, or four if there are more.
        heat: Whether to draw scores too.
        side: Longer side of an image on a sheet in pixels; rounded down to whole patches.
        out: ``.png`` or ``.svg``; by default ``<name>-kept.png`` in the current folder. Numbered if there are more
            images than fit on a sheet.
        force: Whether to replace files.

    Raises:
        InputError: A folder has no images, ``out`` cannot be written, or a block is not a location.
        StageError: A runtime or the disk failed.
    """
    blocks_to_draw(subject.plan, blocks)
    files = image_paths(paths)
    pages = picture_files(out or Path(f"{subject.name}-kept.png"), len(files))
    check_out(pages, force=force)
    given = Given(files, subject.preprocess, subject.shape)
    unreadable: dict[int, Unreadable] = {}

    def note(number: int, error: InputError) -> None:
        unreadable[number] = Unreadable(str(files[number]), str(error))
        _LOG.warning(str(error))

    images: list[ShownImage] = []
    written, differences, grid = [], [], None
    for page, start in enumerate(range(0, len(files), PAGE)):
        progress.step(_LOG, "drawing", start, len(files))
        shown = look(subject, given, start, min(start + PAGE, len(files)), blocks=blocks, on_error=note)
        for difference in shown.differences:
            _LOG.warning(difference)
        differences += shown.differences
        if shown.images:
            grid = shown.images[0].grid
            write_picture(shown.sheet(heat=heat, side=side), pages[page])
            written.append(str(pages[page]))
            images += [_image(one) for one in shown.images]
    runtimes = [teller.runtime for teller in subject.tellers]
    return ShownFiles(subject.about, runtimes, written, grid, images, list(unreadable.values()), differences)


def write_picture(sheet: Sheet, file: Path) -> None:
    """Writes a sheet as PNG or SVG.

    Raises:
        StageError: The disk is full or failing.
    """
    write_atomically(file, sheet.svg().encode() if file.suffix.lower() == ".svg" else sheet.png())


def curve_name(source: str | Path) -> str:
    """Default file name for the curve of a bundle or a checkpoint."""
    return f"{name_of(source)}-curve.svg"


def write_curve(curve: RemovalCurve, file: Path) -> None:
    """Writes a curve as SVG or CSV.

    Raises:
        StageError: The disk is full or failing.
    """
    write_atomically(file, (curve.csv() if file.suffix.lower() == ".csv" else curve.svg()).encode())


def _image(seen: Seen) -> ShownImage:
    return ShownImage(seen.name, seen.answer, [_stage(stage) for stage in seen.stages])


def _stage(stage: Stage) -> ShownStage:
    kept = [] if stage.does == "merged" else np.flatnonzero(stage.kept).tolist()
    return ShownStage(stage.block, stage.does, stage.count, stage.patches, kept, stage.tokens())
