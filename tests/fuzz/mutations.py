"""Hostile inputs: small valid files that are changed in their bytes, or in the structure that the bytes stand for."""

import copy
import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

LARGEST = 1 << 20
"""Bytes of an input; all that grows stops there."""

NUMBERS = (0, 1, -1, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**53 + 1,
           2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\n", "\x1b[2J", "\u202e", "\ud7ff", "\x85", "\ufeff", "..", "../../x", "/dev/zero",
    "x" * 300, "x" * 70_000, "$(touch x)", "`x`", "hf-hub:org/name", "local-dir:/etc", "NaN", "1e999", "true", "None",
    "__class__", "{0.__class__}", "%s%n", "[bold]x[/bold]", "float32", "torch.float8_e4m3fn",
)  # fmt: skip


def nested(depth: int, mapping: bool = False) -> Any:
    """Lists or mappings within one another."""
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


def _values() -> list[Any]:
    floats = [float("nan"), float("inf"), float("-inf"), 1e308, 5e-324, -0.0, 0.5, -1e-9]
    others = [None, True, False, [], {}, [[]], [None], {"": None}, [0] * 10_000, {str(n): n for n in range(3000)}]
    return [*NUMBERS, *TEXTS, *floats, *others, nested(40), nested(60), nested(40, True)]


HOSTILE = _values()
"""What may stand in the place of any part of a document."""


# ---- bytes


@st.composite
def damaged(draw: DrawFn, seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """A valid file, changed in up to six places.

    Args:
        draw: Hypothesis's.
        seeds: The valid files.
        words: What the format's own words are, to be put in anywhere.
    """
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        if draw(st.booleans()):  # headers are at one of the ends in most formats
            place = place % 128 if draw(st.booleans()) else max(len(content) - 1 - place % 128, 0)
        kind = draw(st.sampled_from(("flip", "set", "cut", "drop", "repeat", "number", "insert", "splice", "word")))
        length = draw(st.sampled_from((1, 2, 4, 8, 16, 64, 512, 4096)))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[place] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x0A)))
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + length]
        elif kind == "repeat":
            times = draw(st.sampled_from((2, 3, 50, 1000)))
            content[place:place] = content[place : place + length] * times
        elif kind == "number":
            size = draw(st.sampled_from((2, 4, 8)))
            number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * size)
            content[place : place + size] = number.to_bytes(size, draw(st.sampled_from(("little", "big"))))
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(len(other) - 1, 0)))
            content[place : place + length] = other[start : start + length]
        elif kind == "word" and words:
            content[place:place] = draw(st.sampled_from(words))
        del content[LARGEST:]
    return bytes(content)


# ---- documents


def _mutable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mutable(one) for key, one in value.items()}
    return [_mutable(one) for one in value] if isinstance(value, list | tuple) else value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every part of a document: what holds it, and under which key."""
    found = []
    todo = [value]
    while todo and len(found) < 2000:
        holder = todo.pop()
        pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, part in list(pairs):
            found.append((holder, key))
            if isinstance(part, dict | list):
                todo.append(part)
    return found


@st.composite
def documents(draw: DrawFn, seeds: Sequence[Any], values: Sequence[Any] = ()) -> Any:
    """A valid document of mappings and lists, changed in up to four places; also its keys.

    Args:
        draw: Hypothesis's.
        seeds: The valid documents.
        values: Hostile values that mean something in this format.
    """
    document = _mutable(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        places = _places(document) if isinstance(document, dict | list) else []
        if not places:
            return document
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(("value", "value", "own", "drop", "key", "swap", "wrap")))
        if kind == "value":
            holder[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif kind == "own" and values:
            holder[key] = copy.deepcopy(draw(st.sampled_from(values)))
        elif kind == "drop":
            del holder[key]
        elif kind == "key" and isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS))] = holder.pop(key)
        elif kind == "swap":
            other, name = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(other[name])
        elif kind == "wrap":
            holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]}, [holder[key]] * 3)))
    return document


def as_json(document: Any) -> bytes:
    """JSON with NaN and infinities, as Python writes them."""
    return json.dumps(document, default=str).encode("utf-8", "surrogatepass")[:LARGEST]


def json_files(seeds: Sequence[Any], values: Sequence[Any] = ()) -> SearchStrategy[bytes]:
    """Changed documents as JSON, and documents changed in their bytes."""
    plain = [as_json(seed) for seed in seeds]
    words = (
        b"[" * 5000,
        b'{"a":' * 5000,
        b"1e999",
        b"NaN",
        b"9" * 5000,
        b'"\\ud800"',
        b"\xff\xfe",
        b"null",
        b",",
        b"{}",
    )
    return st.one_of(documents(seeds, values).map(as_json), damaged(plain, words))


def with_length(content: bytes, form: str = "<Q") -> bytes:
    """Content behind its own length, as a safetensors header stands."""
    return struct.pack(form, len(content)) + content


def either(*strategies: SearchStrategy[bytes]) -> SearchStrategy[bytes]:
    """One of these, capped in size."""
    return st.one_of(*strategies).map(lambda content: content[:LARGEST])
