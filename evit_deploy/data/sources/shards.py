"""WebDataset shards on disk.

The shards are indexed here because timm's reader streams them in an order that depends on the number of workers and
processes, and cannot resume in the middle of a run.
"""

import itertools
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evit_deploy.data.images import decode_image
from evit_deploy.data.sources.source import Place, bad_label, file_stamp
from evit_deploy.data.sources.tar_files import check_tar
from evit_deploy.documents import decode_json
from evit_deploy.errors import InputError

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
"""File name extensions of images in shards."""


class Shards:
    """``wds/<folder>``: WebDataset shards on disk; the members of an image share their name up to the first dot."""

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
                assert content is not None  # only files are in members
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
            raise bad_label(label, len(self.classes), where)
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
        return [file_stamp(path) for path in self._files]


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
    """Shards of a split in timm's notation: ``name-{0000..0009}.tar``, optionally with ``|count``, or a name."""
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
    """Expands braces as a shell does, such as in ``a-{00..02}-{x,y}.tar``."""
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
