"""Tar files and Hugging Face datasets, read by timm's readers."""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evit_deploy.data.images import decode_image
from evit_deploy.data.sources.source import Place, bad_label, check_classes, file_stamp
from evit_deploy.data.sources.tar_files import check_tar
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement


class _Timm:
    """Base class for timm's map-style readers: ``reader[i]`` returns an open file and a label."""

    def __init__(self, reader: Any, place: Place, own: Sequence[str], classes: Sequence[str] | None) -> None:
        self._reader, self._place = reader, place
        self.classes = tuple(own if classes is None else classes)
        check_classes(own, self.classes, place.path)
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
            raise bad_label(int(label), len(self._labels), self.name(index))
        return decode_image(content, self.name(index)), self._labels[int(label)]

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return f"{self._place.path}: {self._reader.filename(index) or f'image {index}'}"

    def present(self) -> set[int]:
        """See :class:`Source`."""
        return set(self._labels)


class Tar(_Timm):
    """A tar file of class folders, or a folder with one tar file per class."""

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
        try:  # not cached: worker processes would share the open file and its position
            reader: Any = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
        except tarfile.TarError as error:
            raise InputError(f"the tar file cannot be read: {error}", where=path) from None
        except ValueError:  # raised by timm for an empty list
            raise InputError("no images in this tar file", where=path, wanted="<class>/<image> members") from None
        super().__init__(reader, place, list(reader.class_name_to_idx), classes)

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        member, file, _ = self._reader.samples[index]
        return f"{Path(self._place.path, file or '')}: {member.name}"

    def stamp(self) -> list[Any]:
        """See :class:`Source`."""
        return [file_stamp(path) for path in self._files]


class HuggingFace(_Timm):
    """``hfds/<name>``: a dataset on the Hub, or a folder that ``datasets.load_dataset`` can read."""

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
    """Names of classes that are only numbered."""
    return list(classes) if classes is not None and count <= len(classes) else [str(i) for i in range(count)]
