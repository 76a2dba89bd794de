"""Reading documents from untrusted sources, with limits on size, depth and number of elements.

Manifests, reports, package lists, metadata of checkpoints and configs are read here. A damaged or malicious document
raises :class:`~evit_deploy.errors.InputError`; the work done before that is at most proportional to its size.
"""

import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from evit_deploy.errors import EvitDeployError, InputError

_Kind = TypeVar("_Kind")


class Limits(msgspec.Struct, frozen=True):
    """Upper limits of a document.

    Args:
        size: Bytes.
        depth: Nesting of lists and mappings.
        items: Elements of all lists and mappings together, scalars included.
    """

    size: int = 16 << 20  # the largest we write hold the names of 21,841 classes: about a megabyte
    depth: int = 32
    items: int = 1_000_000


USUAL = Limits()


def read_bytes(path: Path, limits: Limits = USUAL, error: type[EvitDeployError] = InputError) -> bytes:
    """Reads a regular file after checking its size.

    Args:
        path: The file.
        limits: Only ``size`` is used.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``: the file does not exist, is not a regular file (reading a pipe or a
            device could block forever), is too large, or cannot be read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISDIR(status.st_mode):
                raise error("this is a folder", where=path, wanted="a file")
            if not stat.S_ISREG(status.st_mode):
                raise error("this is a pipe, a socket or a device", where=path, wanted="a file")
            content = b"" if status.st_size > limits.size else file.read(limits.size + 1)
            size = max(status.st_size, len(content))  # /proc reports size 0; other files may grow
    except IsADirectoryError:
        raise error("this is a folder", where=path, wanted="a file") from None
    except FileNotFoundError:
        raise error("no such file", where=path) from None
    except EvitDeployError:  # an InputError is a ValueError
        raise
    except ValueError:  # a zero byte in the name
        raise error("not the name of a file", where=repr(str(path))) from None
    except OSError as failure:
        raise error(f"cannot be read ({failure.strerror or failure})", where=path) from None
    if size > limits.size:
        raise error(
            "this file is too large for what it should be", where=path, seen=f"{size:,} bytes",
            wanted=f"at most {limits.size:,}",
        )  # fmt: skip
    return content


def decode_json(
    content: bytes | str,
    kind: type[_Kind],
    where: object,
    limits: Limits = USUAL,
    error: type[EvitDeployError] = InputError,
) -> _Kind:
    """Parses JSON into a type.

    Args:
        content: The JSON.
        kind: A type that msgspec can convert to: a struct, or for example ``dict[str, Any]``.
        where: File it was read from, for messages.
        limits: Upper limits of the document.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``: not valid JSON, over the limits, or not convertible to the type.
    """
    size = len(content)
    if size > limits.size:
        raise error("too large", where=where, seen=f"{size:,} bytes", wanted=f"at most {limits.size:,}")
    try:
        document = msgspec.json.decode(content)
    except RecursionError:
        raise error("nested too deeply", where=where, wanted=f"at most {limits.depth} levels") from None
    except (msgspec.DecodeError, ValueError) as failure:  # ValueError: the text is not valid UTF-8
        raise error(f"not valid JSON: {failure}", where=where) from None
    check_tree(document, where, limits, error)
    return converted(document, kind, where, error)


def read_json(
    path: Path, kind: type[_Kind], limits: Limits = USUAL, error: type[EvitDeployError] = InputError
) -> _Kind:
    """Parses a JSON file into a type; see :func:`read_bytes` and :func:`decode_json`."""
    return decode_json(read_bytes(path, limits, error), kind, path, limits, error)


def converted(document: Any, kind: type[_Kind], where: object, error: type[EvitDeployError] = InputError) -> _Kind:
    """Converts a parsed document to a type; the error names the key that does not fit.

    Raises:
        EvitDeployError: Of the class ``error``.
    """
    try:
        return msgspec.convert(document, kind, str_keys=True)
    except msgspec.ValidationError as failure:
        what, _, place = str(failure).partition(" - at `$")
        place = place.rstrip("`").lstrip(".")
        raise error(what[:1].lower() + what[1:], where=f"{where}: {place}" if place else where) from None
    except (EvitDeployError, ValueError, OverflowError) as failure:  # raised by a struct's ``__post_init__``
        raise error(str(failure), where=where) from None


def check_tree(document: Any, where: object, limits: Limits = USUAL, error: type[EvitDeployError] = InputError) -> None:
    """Checks that a parsed document is not nested too deeply and has not too many elements, in linear time.

    An object referenced from several places is counted at each of them, because serializing it would cost as much.

    Raises:
        EvitDeployError: Of the class ``error``.
    """
    count, depth, level = 0, 0, [document]
    while level:
        count, depth = count + len(level), depth + 1
        if count > limits.items:
            raise error("too many parts", where=where, wanted=f"at most {limits.items:,}")
        if depth > limits.depth + 1:
            raise error("nested too deeply", where=where, wanted=f"at most {limits.depth} levels")
        inside: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inside += part.values()
            elif isinstance(part, list | tuple):
                inside += part
            if count + len(inside) > limits.items:
                break
        level = inside
