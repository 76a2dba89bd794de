"""Files that others may have written: read within limits of size, depth and count, into a type, or refused in words.

Manifests, reports, package lists, metadata of checkpoints and configs are read here. A damaged or hostile one is an
error of its reader (:class:`~evit_deploy.errors.InputError`), and costs no more than its size.
"""

import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from evit_deploy.errors import EvitDeployError, InputError

_Kind = TypeVar("_Kind")


class Limits(msgspec.Struct, frozen=True):
    """What a document may be at most.

    Args:
        size: Bytes.
        depth: Of lists and mappings within one another.
        items: Of lists and mappings together; a text or a number counts as one too.
    """

    size: int = 16 << 20  # the largest that are written hold the names of 21,841 classes: about a megabyte
    depth: int = 32
    items: int = 1_000_000


USUAL = Limits()


def read_bytes(path: Path, limits: Limits = USUAL, error: type[EvitDeployError] = InputError) -> bytes:
    """Reads a regular file; its size is looked at first.

    Args:
        path: The file.
        limits: Only the size matters here.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``: no such file, no regular file (a pipe or a device would be waited for
            without end), a file that is too large, or one that cannot be read.
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
            size = max(status.st_size, len(content))  # a file of /proc has size 0, another may grow meanwhile
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
    """JSON as a type.

    Args:
        content: The JSON.
        kind: What msgspec can convert to: a struct, or a type such as ``dict[str, Any]``.
        where: File it stands in, for messages.
        limits: What it may be at most.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``: no JSON, too much of it, or something else than the type asks for.
    """
    size = len(content)
    if size > limits.size:
        raise error("too large", where=where, seen=f"{size:,} bytes", wanted=f"at most {limits.size:,}")
    try:
        document = msgspec.json.decode(content)
    except RecursionError:
        raise error("nested too deeply", where=where, wanted=f"at most {limits.depth} levels") from None
    except (msgspec.DecodeError, ValueError) as failure:  # a ValueError is text that is no UTF-8
        raise error(f"not valid JSON: {failure}", where=where) from None
    check_tree(document, where, limits, error)
    return converted(document, kind, where, error)


def read_json(
    path: Path, kind: type[_Kind], limits: Limits = USUAL, error: type[EvitDeployError] = InputError
) -> _Kind:
    """A JSON file as a type; see :func:`read_bytes` and :func:`decode_json`."""
    return decode_json(read_bytes(path, limits, error), kind, path, limits, error)


def converted(document: Any, kind: type[_Kind], where: object, error: type[EvitDeployError] = InputError) -> _Kind:
    """A parsed document as a type; the error says at which key it is something else.

    Raises:
        EvitDeployError: Of the class ``error``.
    """
    try:
        return msgspec.convert(document, kind, str_keys=True)
    except msgspec.ValidationError as failure:
        what, _, place = str(failure).partition(" - at `$")
        place = place.rstrip("`").lstrip(".")
        raise error(what[:1].lower() + what[1:], where=f"{where}: {place}" if place else where) from None
    except (EvitDeployError, ValueError, OverflowError) as failure:  # of a struct's own rules
        raise error(str(failure), where=where) from None


def check_tree(document: Any, where: object, limits: Limits = USUAL, error: type[EvitDeployError] = InputError) -> None:
    """Makes sure that a parsed document is not too deep and has not too many parts; takes linear time.

    A part that stands in several places counts at each: written out, it would cost as much.

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
