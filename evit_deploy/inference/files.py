"""Inference on image files; unreadable files are listed, and the others are answered."""

import io
import logging
import shlex
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from evit_deploy.errors import GateFailed, InputError, first_few
from evit_deploy.export.card import EMBEDDING
from evit_deploy.files import write_atomically
from evit_deploy.inference.inputs import image_paths
from evit_deploy.inference.model import Model
from evit_deploy.inference.prediction import Prediction

_LOG = logging.getLogger(__name__)


class Embedded(msgspec.Struct, frozen=True):
    """Summary of one image's embedding.

    Args:
        image: File of the image.
        numbers: Its dimension.
        norm: Its Euclidean norm.
    """

    image: str
    numbers: int
    norm: float


class Unreadable(msgspec.Struct, frozen=True):
    """An image that could not be read.

    Args:
        image: File of the image.
        message: The reason.
    """

    image: str
    message: str


class FileAnswers(msgspec.Struct, frozen=True):
    """Answers for image files.

    Args:
        predictions: For a model with classes, one for each readable image.
        embeddings: For a model without classes, one for each readable image.
        unreadable: Images that could not be read.
        labeled: Whether the classes have names.
    """

    predictions: list[Prediction]
    embeddings: list[Embedded]
    unreadable: list[Unreadable]
    labeled: bool

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Returns the header and rows of a table; only the first row of an image has its name."""
        if self.embeddings:
            rows = [(one.image, str(one.numbers), f"{one.norm:.4g}") for one in self.embeddings]
            return ("image", "numbers", "norm"), rows
        found: list[tuple[str, ...]] = []
        for prediction in self.predictions:
            for place, (label, percent, index) in enumerate(prediction.rows()):
                named = (label,) if self.labeled else ()
                found.append(((prediction.image or "") if place == 0 else "", *named, percent, index))
        return ("image", *(("label",) if self.labeled else ()), "probability %", "class"), found

    def raise_if_unreadable(self) -> None:
        """Raises if any image was unreadable.

        Raises:
            GateFailed: An image could not be read.
        """
        if self.unreadable:
            count = len(self.predictions) + len(self.embeddings) + len(self.unreadable)
            raise GateFailed(
                f"{len(self.unreadable)} of {count} images cannot be read",
                seen=first_few(one.image for one in self.unreadable),
                fix="Those that can be were answered." if count > len(self.unreadable) else None,
            )


def ask_about_files(
    model: Model, paths: Iterable[str | Path], *, top: int = 5, out: Path | None = None, force: bool = False
) -> FileAnswers:
    """Runs a model on image files.

    Args:
        model: The opened model.
        paths: Files, and folders to search recursively.
        top: Number of classes to list for each image.
        out: File for the embeddings of the readable images, float32 ``[n, d]``, in NumPy's ``.npy`` format.
        force: Whether to replace an existing file.

    Raises:
        InputError: A folder has no images, ``out`` cannot be written, or the model has no embeddings.
        StageError: The runtime failed, or the file could not be written.
    """
    embeds = model.bundle.manifest.answer == EMBEDDING
    if out is not None:
        _check_out(out, embeds=embeds, force=force)
    files = image_paths(paths)
    unreadable: dict[int, Unreadable] = {}

    def note(number: int, error: InputError) -> None:
        unreadable[number] = Unreadable(str(files[number]), str(error))
        _LOG.warning(str(error))

    predictions: list[Prediction] = []
    embeddings: list[Embedded] = []
    if embeds:
        found = model.embed(files, on_error=note)
        read = [str(file) for number, file in enumerate(files) if number not in unreadable]
        norms = np.linalg.norm(found, axis=1).tolist()
        embeddings = [Embedded(file, found.shape[1], norm) for file, norm in zip(read, norms, strict=True)]
        if out is not None and len(found):
            content = io.BytesIO()
            np.save(content, found)
            write_atomically(out, content.getvalue())
    else:
        predictions = model.predict(files, top=top, on_error=note)
    return FileAnswers(predictions, embeddings, list(unreadable.values()), model.labels is not None)


def _check_out(out: Path, *, embeds: bool, force: bool) -> None:
    if not embeds:
        raise InputError(
            "--out is for embeddings, and this bundle answers with classes", where=out, fix="--json has all answers."
        )
    if out.suffix != ".npy":
        raise InputError(
            "embeddings are written as NumPy's .npy",
            where=out,
            fix=f"Say --out {shlex.quote(str(out.with_suffix('.npy')))}.",
        )
    if out.is_dir():
        raise InputError("this is a folder", where=out, wanted="a file")
    if out.exists() and not force:
        raise InputError("it exists already", where=out, fix="Give --force to replace it, or another --out.")
    if not out.parent.is_dir():
        raise InputError("its folder is not there", where=out, seen=out.parent)
