"""Safetensors files whose header asks for what is not read."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from evit_deploy.errors import InputError
from evit_deploy.tensor_files.safetensors_file import read_safetensors


def written(folder: Path, header: dict[str, Any] | bytes, content: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)
    return folder / "w.safetensors"


def one(dtype: str = "F32", shape: Any = (1,), end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def test_a_plain_one_is_read(tmp_path):
    tensors, metadata = read_safetensors(written(tmp_path, {"a": one(), "__metadata__": {"k": "v"}}, b"\0\0\x80\x3f"))
    assert (tensors["a"].tolist(), metadata) == ([1.0], {"k": "v"})


@pytest.mark.parametrize(
    ("header", "content", "words"),
    [
        ({"a": one("F8_E4M3", (4,))}, b"0000", "'a' has elements that weights are not read from"),
        ({"a": one("F4", (8,))}, b"0000", "'a' has elements"),
        ({"a": one("C64", (1,), 8)}, b"00000000", "'a' has elements"),
        ({"a": one("X1")}, b"0000", "not a whole safetensors file"),
        ({"a\x1b[31m": one()}, b"0000", "cannot be shown"),
        ({"": one()}, b"0000", "cannot be shown"),
        ({"x" * 600: one()}, b"0000", "cannot be shown"),
        ({"a": one(shape=(2**40, 2**40))}, b"0000", "not a whole"),
        ({"a": one(shape=(1,) * 1000)}, b"0000", "1,000 axes"),
        ({"a": one(end=2**50)}, b"0000", "not a whole"),
        ({"a": one(shape=(-1,))}, b"0000", "not a whole"),
        ({"a": one(), "b": one()}, b"0000", "not a whole"),  # overlapping
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000", "not a whole"),  # a hole
        (b"[" * 100_000, b"", "not a whole"),
        (b'{"a":' * 100_000, b"", "not a whole"),
        (b"{" + b" " * (17 << 20) + b"}", b"", "too long"),
        ({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_001)}, b"", "too many"),
    ],
    ids=str.split(
        "fp8 fp4 complex unknown escape empty long overflow axes beyond negative overlap hole lists nested header many"
    ),
)
def test_headers_that_are_refused(tmp_path, header, content, words):
    with pytest.raises(InputError, match=words) as caught:
        read_safetensors(written(tmp_path, header, content))
    assert str(caught.value).isprintable()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="a pipe"):
        read_safetensors(tmp_path / "w.safetensors")
