"""What lies in a bundle besides its models: the manifest and the golden answers."""

import functools
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from evit_deploy.bundle.bundle import changed_files, read_bundle
from evit_deploy.bundle.manifest import GOLDEN, MANIFEST, Manifest
from evit_deploy.verification.golden import load_golden
from tests.fuzz.harness import Format
from tests.fuzz.mutations import NUMBERS, TEXTS, damaged, either, json_files
from tests.fuzz.seeds import bundle

_VALUES = (*TEXTS, *NUMBERS, "evil", "squash", "border", "int8", "model.onnx", "dense/../../x", "CON", "golden.npz")


def look_at(path: Path) -> None:
    """What every command does with a bundle first, and what it shows of it."""
    found = read_bundle(path.parent)
    repr(found)
    found.facts()
    changed_files(found)


@functools.cache
def small_files() -> Mapping[str, bytes]:
    """The files of a bundle, small ones in the place of all: their hashes are not those listed, which is said."""
    names = json.loads((bundle() / MANIFEST).read_text())["files"]
    return dict.fromkeys(names, b"content")


def _manifests() -> SearchStrategy[bytes]:
    return json_files([json.loads((bundle() / MANIFEST).read_text())], _VALUES)


# ---- golden answers


@functools.cache
def manifest() -> Manifest:
    """Of the bundle that the golden answers belong to."""
    return msgspec.json.decode((bundle() / MANIFEST).read_bytes(), type=Manifest)


@functools.cache
def golden() -> dict[str, bytes]:
    """The members of a valid file, an ``.npy`` each."""
    with zipfile.ZipFile(bundle() / GOLDEN) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@st.composite
def archives(draw: DrawFn) -> bytes:
    """Archives of arrays of other types, shapes and values, with damaged headers, packed or not, double or missing."""
    members = dict(golden())
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(members)))
        kind = draw(st.sampled_from(("array", "array", "value", "header", "drop", "rename", "object")))
        if kind == "array":
            members[name] = npy(draw(_arrays()))
        elif kind == "value":
            array = np.load(io.BytesIO(golden().get(name, golden()["logits.npy"]))).copy()
            if array.size and array.dtype.kind == "f":
                array.flat[draw(st.integers(0, array.size - 1))] = draw(
                    st.sampled_from((float("nan"), float("inf"), -1e30, 1e12, 0))
                )
            members[name] = npy(array)
        elif kind == "header":
            head, rest = members[name][:128], members[name][128:]
            members[name] = draw(damaged([head], (b"1" * 20, b", 99999", b"'descr': '|O'", b"(", b"}", b"<f2"))) + rest
        elif kind == "drop":
            del members[name]
        elif kind == "rename":
            members[
                draw(st.sampled_from(("kept_9.npy", "kept_.npy", "margin_x.npy", "x_y_z.npy", "x", "../x.npy")))
            ] = members[name]
        else:
            members[name] = npy(np.array([{}, 1], dtype=object))
        if not members:
            break
    file = io.BytesIO()
    method = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(array: Any) -> bytes:
    """An array as a member of an archive."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@st.composite
def _arrays(draw: DrawFn) -> Any:
    dtype = draw(
        st.sampled_from(("<f4", "<f8", "<f2", ">f4", "<i4", "<i8", "|b1", "<c8", "<U4", "|S3", "<M8[s]", "|V8"))
    )
    shape = draw(st.lists(st.sampled_from((0, 1, 2, 4, 10, 37, 3000)), max_size=4))
    if np.prod(shape, dtype=float) > 1e7:
        shape = shape[:1]
    return np.zeros(shape, dtype)


@functools.cache
def _whole() -> bytes:
    return (bundle() / GOLDEN).read_bytes()


def _goldens() -> SearchStrategy[bytes]:
    return either(archives(), damaged([_whole()]))


FORMATS = (
    Format("manifest", MANIFEST, _manifests, look_at, small_files),
    Format("golden", GOLDEN, _goldens, lambda path: load_golden(path, manifest())),
)
