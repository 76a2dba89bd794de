"""Labeled images by number, wherever they lie: class folders, tar files, WebDataset shards, Hugging Face datasets.

Names are those that timm's ``--dataset`` and ``--data-dir`` take. Tar files and Hugging Face datasets are read by
timm's readers. Class folders are listed here, because timm's reader names a class after the innermost folder and drops
unknown classes silently. Shards are indexed here, because timm's reader streams them in an order that depends on the
number of workers and processes, and cannot begin in the middle of a run.
"""

import copy
import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from PIL import Image

from evit_deploy.data.images import COPY_AGAIN, EXTENSIONS, decode_image, natural, preprocess_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.tar_files import check_tar
from evit_deploy.documents import decode_json
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement, first_few

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
"""Endings of the images in shards."""

SPLITS = ("val", "valid", "validation", "eval", "test", "testing", "train", "training")
"""What the parts of a data set are called, in lower case: folders of these names hold classes, and are none."""


class Source(Protocol):
    """Labeled images by number."""

    classes: tuple[str, ...]
    """Class names; a label is an index into them."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, read to its end, and its label. Raises an :class:`InputError` if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What an image is called in messages."""
        ...

    def present(self) -> set[int]:
        """Labels that occur, as far as the source tells without reading every image."""
        ...

    def stamp(self) -> list[Any]:
        """What changes when an image does: names, sizes and times of files."""
        ...


class Place(msgspec.Struct, frozen=True):
    """Where labeled images lie.

    Args:
        path: A folder, a ``.tar``, ``wds/<folder>`` or ``hfds/<name or folder>``.
        split: ``hfds``: timm's split; ``wds``: shards in brace notation or a split of ``_info.json``.
        input_key: ``hfds``: the column of images.
        target_key: ``hfds``: the column of labels; ``wds``: a field of the JSON beside an image instead of ``.cls``.
        num_classes: ``wds``: how many classes there are.
    """

    path: str
    split: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    num_classes: int | None = None


def open_source(place: Place, classes: Sequence[str] | None = None) -> Source:
    """Opens labeled images.

    Args:
        place: Where they lie.
        classes: The training images' classes, for validation images: labels are numbered alike, and a class that is not
            among them is refused.

    Raises:
        InputError: There are none, or their classes do not fit.
        MissingRequirement: The package that reads them is not installed.
    """
    kind, _, rest = place.path.partition("/")
    if kind == "hfds":
        return HuggingFace(place, rest, classes)
    if kind == "wds":
        return Shards(place, rest, classes)
    if kind in ("hfids", "tfds", "torch"):
        raise InputError(f"images cannot be read by timm's {kind!r} here", where=place.path,
                         wanted="a folder, FILE.tar, wds/FOLDER or hfds/NAME")  # fmt: skip
    if place.path.endswith(".tar") or _holds_tars(Path(place.path)):
        return Tar(place, classes)
    return Folder(place.path, classes)


def labeled_batches(source: Source, preprocess: Preprocess, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every image of a source once, in order, as the deployed model takes it.

    Args:
        source: The images.
        preprocess: What is done with each.
        batch_size: Images a batch; the last batch may be smaller.

    Yields:
        Images float32 ``[B, 3, H, W]`` and labels int64 ``[B]``.

    Raises:
        InputError: An image cannot be read.
    """
    for start in range(0, len(source), batch_size):
        images, labels = [], []
        for index in range(start, min(start + batch_size, len(source))):
            try:
                image, label = source.load(index)
            except InputError as error:
                raise InputError(
                    error.what, where=error.where, seen=error.seen, wanted=error.wanted, fix=error.fix or COPY_AGAIN
                ) from None
            images.append(preprocess_image(image, preprocess))
            labels.append(label)
        yield np.stack(images), np.array(labels, np.int64)


def _holds_tars(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.tar")) and not any(entry.is_dir() for entry in path.iterdir())


def class_folders(root: Path) -> list[str]:
    """Names of a folder's folders, hidden ones left out, numbers in them ordered as numbers."""
    return sorted((e.name for e in root.iterdir() if e.is_dir() and not e.name.startswith(".")), key=natural)


def is_labeled(root: Path) -> bool:
    """Whether a folder is to be read as class folders: not where it holds images and none of its folders does."""
    if not root.is_dir():
        return True  # Folder says what is wrong with it
    inside = any(_is_image(file) for name in class_folders(root) for file in (root / name).rglob("*"))
    return inside or not any(_is_image(file) for file in root.iterdir())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")


def _refuse_splits(root: Path, names: Sequence[str]) -> None:
    """Refuses the folder above ``train/`` and ``val/``, whose parts would be taken for two classes."""
    splits = sorted((n for n in names if n.lower() in SPLITS), key=lambda name: SPLITS.index(name.lower()))
    holding = [name for name in splits if any(entry.is_dir() for entry in (root / name).iterdir())]
    alone = len(splits) == len(names) and (len(splits) > 1 or bool(holding))
    if len(holding) < 2 and not (splits and alone):
        return
    raise InputError(
        "this folder holds the parts of a data set, not its classes", where=root, seen=", ".join(splits),
        wanted="one folder of images a class",
        fix="Give one of them: " + " or ".join(str(root / name) for name in splits) + ".",
    )  # fmt: skip


class Folder:
    """Images on disk, ``<class>/**/<image>``.

    Args:
        path: A folder with one folder a class.
        classes: Class names; by default the folders' names, numbers in them ordered as numbers.

    Raises:
        InputError: The path is missing, is a file, holds no images in class folders, holds ``train`` and ``val`` rather
            than classes, or has a class that is not among ``classes``.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None) -> None:
        root = Path(path)
        if not root.exists():
            raise InputError("no such folder", where=root)
        if not root.is_dir():
            raise InputError("this is a file", where=root, wanted="a folder with one folder of images a class")
        found = class_folders(root)
        _refuse_splits(root, found)
        self.classes = tuple(found if classes is None else classes)
        numbers = {name: i for i, name in enumerate(self.classes)}
        unknown = next((name for name in found if name not in numbers), None)
        if unknown is not None:
            raise InputError(
                "this class is not among the model's",
                where=root / unknown,
                wanted=f"one of {first_few(self.classes, 8)}",
            )
        self._root = root
        self._files = tuple(
            (file, numbers[name])
            for name in found
            for file in sorted((root / name).rglob("*"), key=lambda file: natural(str(file)))
            if _is_image(file)
        )
        if not self._files:
            loose = any(map(_is_image, root.iterdir()))
            seen = "images outside class folders" if loose else f"{len(found)} class folders, no images"
            raise InputError("no labeled images here", where=root, seen=seen, wanted="<class>/<image> files")
        filled = self.present()
        empty = next((name for name in found if numbers[name] not in filled), None)
        if empty is not None:
            fix = "Put images into it or delete it."
            raise InputError("this class folder holds no images", where=root / empty, fix=fix)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every image's file, by number."""
        return tuple(path for path, _ in self._files)

    @property
    def labels(self) -> tuple[int, ...]:
        """Every image's label, by number."""
        return tuple(label for _, label in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def split(self, share: float) -> "tuple[Folder, Folder]":
        """All but a share of each class, and that share: of two or more images at least one on either side.

        The hash of an image's class and name decides, so that the same images are held out every time, on every
        machine, and an image that is added or deleted moves few others.

        Args:
            share: Of each class, above 0 and below 1; rounded to whole images.
        """
        held: set[int] = set()
        for _, group in itertools.groupby(range(len(self)), lambda index: self._files[index][1]):
            numbers = sorted(group, key=self._place)
            held.update(numbers[: min(max(round(share * len(numbers)), 1), len(numbers) - 1)])
        return self._only(set(range(len(self))) - held), self._only(held)

    def _place(self, index: int) -> bytes:
        return hashlib.sha256(self._files[index][0].relative_to(self._root).as_posix().encode()).digest()

    def _only(self, numbers: set[int]) -> "Folder":
        part = copy.copy(self)
        part._files = tuple(file for index, file in enumerate(self._files) if index in numbers)
        return part

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`Source`."""
        path, label = self._files[index]
        try:
            return decode_image(path.read_bytes(), path), label
        except OSError as error:
            raise InputError(f"the image cannot be read: {error.strerror or error}", where=path) from None

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return str(self._files[index][0])

    def present(self) -> set[int]:
        """See :class:`Source`."""
        return {label for _, label in self._files}

    def stamp(self) -> list[Any]:
        """See :class:`Source`."""
        return [_file_stamp(path) for path, _ in self._files]


class _Timm:
    """What timm's map-style readers have in common: ``reader[i]`` is an open file and a label."""

    def __init__(self, reader: Any, place: Place, own: Sequence[str], classes: Sequence[str] | None) -> None:
        self._reader, self._place = reader, place
        self.classes = tuple(own if classes is None else classes)
        _check_classes(own, self.classes, place.path)
        self._labels = [self.classes.index(name) for name in own]
        if not len(reader):
            raise InputError("no images here", where=place.path)

    def __len__(self) -> int:
        return len(self._reader)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`Source`."""
        try:
            file, label = self._reader[index]
            with file:
                content = file.read()
        except (OSError, tarfile.TarError, AssertionError) as error:
            raise InputError(f"the image cannot be read: {error}", where=self.name(index)) from None
        if not 0 <= int(label) < len(self._labels):
            raise _bad_label(int(label), len(self._labels), self.name(index))
        return decode_image(content, self.name(index)), self._labels[int(label)]

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return f"{self._place.path}: {self._reader.filename(index) or f'image {index}'}"

    def present(self) -> set[int]:
        """See :class:`Source`."""
        return set(self._labels)


class Tar(_Timm):
    """One tar of class folders, or a folder with one tar a class."""

    def __init__(self, place: Place, classes: Sequence[str] | None) -> None:
        from timm.data.readers.reader_image_in_tar import ReaderImageInTar

        path = Path(place.path)
        if not path.exists():
            raise InputError("no such tar file", where=path)
        self._files = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not self._files:
            raise InputError("neither a tar file nor a folder of tar files", where=path)
        for file in self._files:
            check_tar(file)
        try:  # a tar that stays open would be shared by worker processes, position and all
            reader: Any = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
        except tarfile.TarError as error:
            raise InputError(f"the tar file cannot be read: {error}", where=path) from None
        except ValueError:  # timm's, of an empty list
            raise InputError("no images in this tar file", where=path, wanted="<class>/<image> members") from None
        super().__init__(reader, place, list(reader.class_name_to_idx), classes)

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        member, file, _ = self._reader.samples[index]
        return f"{Path(self._place.path, file or '')}: {member.name}"

    def stamp(self) -> list[Any]:
        """See :class:`Source`."""
        return [_file_stamp(path) for path in self._files]


class HuggingFace(_Timm):
    """``hfds/<name>``: a dataset of the Hub, or a folder that ``datasets.load_dataset`` reads."""

    def __init__(self, place: Place, name: str, classes: Sequence[str] | None) -> None:
        try:
            from datasets.exceptions import DatasetsError
        except ImportError:
            raise MissingRequirement(
                "Hugging Face datasets are read by the package datasets", fix=f"Run: {install_line('data')}"
            ) from None
        from timm.data.readers.reader_hfds import ReaderHfds

        input_key, target_key = place.input_key or "image", place.target_key or "label"
        try:
            reader: Any = ReaderHfds(name, split=place.split or "train", input_key=input_key, target_key=target_key)
        except (OSError, ValueError, KeyError, AttributeError, DatasetsError) as error:
            fix = "Give the split (data.train_split, data.validation_split), or data.input_key."
            raise InputError(f"the dataset cannot be opened: {error}", where=place.path, fix=fix) from None
        columns = reader.dataset.column_names
        if target_key not in columns:
            raise InputError(f"there is no column {target_key!r}", where=place.path, wanted=", ".join(columns),
                             fix="Set data.target_key.")  # fmt: skip
        own = list(reader.class_to_idx) or _numbered(int(max(reader.dataset[target_key])) + 1, classes)
        self._fingerprint = reader.dataset._fingerprint
        super().__init__(reader, place, own, classes)

    def stamp(self) -> list[Any]:
        """See :class:`Source`."""
        return [self._fingerprint]


def _numbered(count: int, classes: Sequence[str] | None) -> list[str]:
    """Names of classes that have only numbers."""
    return list(classes) if classes is not None and count <= len(classes) else [str(i) for i in range(count)]


class Shards:
    """``wds/<folder>``: WebDataset shards on a disk; an image's members share their name up to the first dot."""

    def __init__(self, place: Place, root: str, classes: Sequence[str] | None) -> None:
        self.classes = _shard_classes(place, classes)
        self._target_key, self._files = place.target_key, _shard_files(Path(root), place.split)
        self._images: list[tuple[int, str, int, int, int]] = []  # file, name, offset, length, label
        for number, file in enumerate(self._files):
            try:
                self._images.extend(self._indexed(number, file))
            except (tarfile.TarError, OSError) as error:
                raise InputError(f"the shard cannot be read: {error}", where=file) from None
        if not self._images:
            raise InputError("no labeled images in these shards", where=place.path, wanted=".jpg beside .cls members")

    def _indexed(self, number: int, file: Path) -> list[tuple[int, str, int, int, int]]:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        found = []
        check_tar(file)
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, ending = base.partition(".")
                if member.isfile() and key:
                    samples.setdefault(f"{folder}/{key}", {})[ending.lower()] = member
            wanted = "json" if self._target_key else "cls"
            for key, members in samples.items():
                image = next((members[ending] for ending in IMAGES if ending in members), None)
                if image is None:
                    continue
                if wanted not in members:
                    raise InputError(f"an image has no .{wanted} beside it", where=f"{file}: {image.name}")
                content = tar.extractfile(members[wanted])
                assert content is not None  # a file, see above
                label = self._label(content.read(), f"{file}: {key.lstrip('/')}.{wanted}")
                found.append((number, image.name, image.offset_data, image.size, label))
        return found

    def _label(self, text: bytes, where: str) -> int:
        try:
            found = decode_json(text, dict[str, Any], where)[self._target_key] if self._target_key else text
            label = int(found)
            if isinstance(found, float) and found != label:
                raise ValueError(f"{found} is not a whole number")
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"the label cannot be read: {error!r:.200}", where=where, wanted="an integer") from None
        if not 0 <= label < len(self.classes):
            raise _bad_label(label, len(self.classes), where)
        return label

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`Source`."""
        number, _, offset, length, label = self._images[index]
        try:
            with self._files[number].open("rb") as file:
                file.seek(offset)
                content = file.read(length)
        except OSError as error:
            raise InputError(f"the image cannot be read: {error}", where=self.name(index)) from None
        return decode_image(content, self.name(index)), label

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        number, name, *_ = self._images[index]
        return f"{self._files[number]}: {name}"

    def present(self) -> set[int]:
        """See :class:`Source`."""
        return {label for *_, label in self._images}

    def stamp(self) -> list[Any]:
        """See :class:`Source`."""
        return [_file_stamp(path) for path in self._files]


def _shard_classes(place: Place, classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is not None:
        if place.num_classes not in (None, len(classes)):
            raise InputError("not the number of classes of the training images", where="data.num_classes",
                             seen=place.num_classes, wanted=len(classes))  # fmt: skip
        return tuple(classes)
    if place.num_classes is None:
        fix = "Shards hold numbers and no names: set data.num_classes."
        raise InputError("the number of classes is unknown", where=place.path, fix=fix)
    return tuple(str(number) for number in range(place.num_classes))


def _shard_files(root: Path, split: str | None) -> list[Path]:
    """Shards of a split as timm writes it: ``name-{0000..0009}.tar``, perhaps with ``|count``, or a name."""
    if not root.is_dir():
        raise InputError("no such folder", where=f"wds/{root}", wanted="wds/FOLDER, shards on this disk")
    if split is None:
        files = sorted(root.glob("*.tar"))
    elif ".tar" in split:
        files = [root / name for name in _expanded(split.partition("|")[0])]
    else:
        files = [root / name for name in _info_files(root, split)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        fix = "Set data.train_split and data.validation_split, such as train-{0000..0009}.tar."
        raise InputError("no such shard" if missing else "no shards here", where=missing or root, fix=fix)
    return files


def _info_files(root: Path, split: str) -> list[str]:
    for name in ("_info.json", "info.json"):
        if (root / name).is_file():
            try:
                splits = json.loads((root / name).read_bytes())["splits"]
                return list(splits[split]["filenames"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"no split {split!r} in it: {error!r}", where=root / name) from None
    raise InputError("no _info.json that lists splits", where=root, seen=split, wanted="name-{0000..0009}.tar")


def _expanded(text: str) -> list[str]:
    """``a-{00..02}-{x,y}.tar`` as the shell would write it out."""
    parts = []
    for part in re.split(r"(\{[^{}]*\})", text):
        if not part.startswith("{"):
            parts.append([part])
        elif span := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = span.groups()
            parts.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
        else:
            parts.append(part[1:-1].split(","))
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _check_classes(own: Sequence[str], classes: Sequence[str], where: str) -> None:
    unknown = [name for name in own if name not in classes]
    if unknown:
        raise InputError(
            "classes that are not among the training images'", where=where, seen=first_few(unknown, 5),
            wanted=f"some of the {len(classes)}: {first_few(classes, 5)}",
        )  # fmt: skip


def _bad_label(label: int, classes: int, where: str) -> InputError:
    return InputError("a label is not among the classes", where=where, seen=label, wanted=f"0 to {classes - 1}",
                      fix="Set data.num_classes to the number of classes.")  # fmt: skip


def _file_stamp(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]
