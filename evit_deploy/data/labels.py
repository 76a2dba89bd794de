"""Class names from a file, one per line or as JSON."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evit_deploy.documents import Limits, decode_json, read_bytes
from evit_deploy.errors import InputError

LIMITS = Limits(size=16 << 20, depth=8, items=1_000_000)
"""Limits of a label file: 21,843 ImageNet labels take 1 MB, and a ``config.json`` contains more than labels."""
LONGEST = 1_000
"""Maximum number of letters in a label."""


def read_labels(path: str | Path) -> list[str]:
    """Reads class names, in the order of the model's outputs.

    Args:
        path: UTF-8 text with one name per line, or JSON: a list of names or ``{"0": name, "1": name, ...}``, at the top
            level or as ``id2label`` of a ``config.json``. In text, only line feeds separate names, with or without a
            carriage return. Two classes may have the same name, as in ImageNet.

    Raises:
        InputError: The file cannot be read, or contains no names.
    """
    path, where = Path(path), f"--labels {path}"
    try:
        content = read_bytes(path, LIMITS)
    except InputError as error:
        what = f"the labels cannot be read: {error.what}"
        raise InputError(what, where=where, seen=error.seen, wanted=error.wanted) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("the labels cannot be read (not UTF-8 text)", where=where) from None
    if path.suffix.lower() == ".json":
        return _of_json(text, where)
    # Not str.splitlines, which would also split a name at a form feed or at U+0085.
    names = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    if not names:
        raise InputError("no labels in it", where=where, wanted="one on each line")
    check_labels(names, where)
    return names


def check_labels(names: Sequence[Any], where: str) -> None:
    """Checks that class names can be displayed and written to a file, one per line.

    Raises:
        InputError: A name is not text, is empty or too long, or contains a line break or a zero byte.
    """
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError("a class without a name", where=where, seen=f"{name!r:.60} for class {number}")
        if len(name) > LONGEST:
            seen, wanted = f"{len(name):,} letters for class {number}", f"at most {LONGEST:,}"
            raise InputError("a label is too long", where=where, seen=seen, wanted=wanted)
        if any(end in name for end in "\r\n\0"):  # a server truncates names at a zero byte
            raise InputError("a label must fit on one line", where=where, seen=repr(name))
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise InputError("a label contains half of a surrogate pair", where=where, seen=repr(name))


def same_classes(labels: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether folder names match a model's class names, in the order of its outputs.

    ImageNet folders are named by synset, ``n01440764``, while models often use the synset's words, ``tench, Tinca
    tinca``. The wording sometimes differs, so 90 % of the names have to match.
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
    content: Any = decode_json(text, object, where, LIMITS)
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):
        content = content["id2label"]
    if isinstance(content, dict):
        content = [content.get(str(number)) for number in range(len(content))]
    if not isinstance(content, list) or not content:
        raise InputError("no labels in it", where=where, wanted='["name", ...] or {"0": "name", ...}')
    check_labels(content, where)
    return content
