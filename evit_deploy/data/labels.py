"""Class names in a file: one on each line, or as JSON."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evit_deploy.errors import InputError

_LARGEST = 16 << 20
"""Bytes: 21,843 ImageNet labels take 1 MB."""


def read_labels(path: str | Path) -> list[str]:
    """Reads class names, in the order of the model's outputs.

    Args:
        path: Text with one name on each line; or JSON, a list of names or ``{"0": name, "1": name, ...}``, bare or as
            ``id2label`` of a ``config.json``.

    Raises:
        InputError: The file cannot be read, or holds no names.
    """
    path, where = Path(path), f"--labels {path}"
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError("too large for a list of labels", where=where, wanted=f"at most {_LARGEST} bytes")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"the labels cannot be read ({error.strerror or error})", where=where) from None
    except UnicodeDecodeError:
        raise InputError("the labels cannot be read (not UTF-8 text)", where=where) from None
    if path.suffix.lower() == ".json":
        return _of_json(text, where)
    # Not str.splitlines, which also parts a name at a form feed or at U+0085.
    names = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    check_labels(names, where)
    return names


def check_labels(names: Sequence[Any], where: str) -> None:
    """Makes sure that class names can be shown and written one on each line.

    Raises:
        InputError: One is no text, empty, or has a line break in it.
    """
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError("a class without a name", where=where, seen=f"{name!r} for class {number}")
        if any(end in name for end in "\r\n"):
            raise InputError("a label has to fit on one line", where=where, seen=repr(name))


def same_classes(labels: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether folders are named after a model's classes, in the order of its outputs.

    ImageNet's folders have the numbers of its synsets, ``n01440764``, and models often their words, ``tench, Tinca
    tinca``. Wordings differ in places, so nine of ten have to be the same.
    """
    if list(labels) == list(folders) or len(labels) != len(folders):
        return list(labels) == list(folders)
    if not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return False
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    words = [info.label_name_to_description(name, detailed=False) for name in folders]
    return sum(one == other for one, other in zip(labels, words, strict=True)) >= 0.9 * len(labels)


def _of_json(text: str, where: str) -> list[str]:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the labels are not JSON ({error})", where=where) from None
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):
        content = content["id2label"]
    if isinstance(content, dict):
        content = [content.get(str(number)) for number in range(len(content))]
    if not isinstance(content, list) or not content:
        raise InputError("no labels in it", where=where, wanted='["name", ...] or {"0": "name", ...}')
    check_labels(content, where)
    return content
