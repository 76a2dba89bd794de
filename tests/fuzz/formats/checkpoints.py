"""Files of weights: pickles, safetensors, what lies beside them, and the two other pickles that training reads."""

import functools
import io
import json
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from evit_deploy.data.training.token_labels import read_token_labels
from evit_deploy.models.checkpoint import METADATA_KEY, build_model, read_checkpoint
from evit_deploy.recipe.recipe import load_recipe
from evit_deploy.training.state import StateFile, asked
from tests.fuzz.harness import Format
from tests.fuzz.mutations import NUMBERS, TEXTS, as_json, damaged, documents, either, json_files
from tests.support.models import of_kind, write_checkpoint
from tests.support.paths import ROOT
from tests.support.shared import made_once

DTYPES = tuple(
    getattr(torch, name)
    for name in ("float16", "bfloat16", "float64", "int8", "int64", "bool", "complex64", "float8_e4m3fn", "uint16")
)
SIZES = (0, 1, 2, 3, 48, 64, 196, 2**20, 2**31, 2**40, 2**63 - 1, -1)


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """Of the smallest model."""
    return {name: value.contiguous() for name, value in of_kind("smallest").state_dict().items()}


def pickled(content: Any) -> bytes:
    """As ``torch.save`` writes it."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def read_weights_and_build(path: Path) -> None:
    """What ``convert`` does first."""
    checkpoint = read_checkpoint(path)
    build_model(checkpoint)


# ---- pickles


@functools.cache
def pickles() -> tuple[bytes, ...]:
    """Valid files in several forms."""
    few = {name: value for name, value in weights().items() if not name.startswith("blocks.1")}
    wrapped = {"model": OrderedDict(weights()), "epoch": 3, "args": {"base_keep_rate": 0.7, "drop_loc": "(3, 6, 9)"}}
    return (pickled(weights()), pickled(wrapped), pickled({"state_dict": few}))


@st.composite
def zips(draw: DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Archives whose members are changed, with their check sums made anew: the changes reach the pickle in it."""
    with zipfile.ZipFile(io.BytesIO(draw(st.sampled_from(seeds)))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    small = [name for name, content in members.items() if len(content) < 1 << 16]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(small))
        kind = draw(st.sampled_from(("damage", "damage", "opcode", "drop", "rename", "double")))
        if kind == "damage":
            members[name] = draw(damaged([members[name]], _WORDS))
        elif kind == "opcode":
            pickle = next((name for name in members if name.endswith("data.pkl")), name)
            members[pickle] = draw(_opcodes(members[pickle]))
        elif kind == "drop":
            members[name] = b""
        elif kind == "rename":
            members[draw(st.sampled_from(TEXTS)).replace("\0", "0") or "x"] = members[name]
        else:
            members[name] = members[name] * 2
    file = io.BytesIO()
    method = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name[:60_000], content)
    return file.getvalue()


_WORDS = (
    b"cbuiltins\neval\n", b"cos\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"(", b"t", b"R", b".", b"]", b"}",
    b"s", b"\x80\x02", b"]" * 4000 + b"a" * 4000, b"cbuiltins\ngetattr\n", b"ccollections\nOrderedDict\n", b"h\x00",
    b"J\xff\xff\xff\xff",
)  # fmt: skip


@st.composite
def _opcodes(draw: DrawFn, content: bytes) -> bytes:
    """A pickle with numbers in it replaced, or steps left out, doubled or exchanged."""
    try:
        steps = [place for _, _, place in pickletools.genops(content) if place is not None]
    except Exception:  # damaged before
        return content
    parts = [content[start:end] for start, end in zip(steps, [*steps[1:], len(content)], strict=True)]
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(parts) - 1))
        kind = draw(st.sampled_from(("number", "drop", "double", "swap")))
        if kind == "number":
            numbers = [i for i, part in enumerate(parts) if part[:1] in b"KMJ\x8a"]
            place = numbers[place % len(numbers)] if numbers else place
            value = draw(st.sampled_from(NUMBERS[:-2]))
            size = value.bit_length() // 8 + 1
            parts[place] = b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        elif kind == "drop":
            parts[place] = b""
        elif kind == "double":
            parts[place] *= 2
        else:
            other = draw(st.integers(0, len(parts) - 1))
            parts[place], parts[other] = parts[other], parts[place]
    return b"".join(parts)


@st.composite
def odd_states(draw: DrawFn) -> bytes:
    """Tensors that ``torch.save`` writes and no model has: types, layouts, strides, keys; wrappers of all sorts."""
    state: dict[Any, Any] = dict(weights())
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(map(str, state))))
        state[name] = draw(_tensors())
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.one_of(st.sampled_from(TEXTS), st.integers(0, 3), st.booleans(), st.none()))
        state[key] = draw(st.sampled_from((torch.zeros(2), "text", 3, None, [1], {"a": torch.zeros(1)})))
    wrapper = draw(st.sampled_from((None, "model", "state_dict", "teacher", "args", "model.model")))
    for key in (wrapper or "").split(".") if wrapper else ():
        state = {key: state}
    if draw(st.booleans()):
        state["args"] = draw(documents([{"base_keep_rate": 0.7, "drop_loc": "(3, 6, 9)", "fuse_token": True}]))
    return pickled(state)


@st.composite
def _tensors(draw: DrawFn) -> Any:
    kind = draw(
        st.sampled_from(("dtype", "expand", "shape", "sparse", "quantized", "meta", "nan", "strides", "nested"))
    )
    if kind == "dtype":
        return torch.zeros(48, 48).to(draw(st.sampled_from(DTYPES)))
    if kind == "expand":
        return torch.zeros(1).expand(*draw(st.lists(st.sampled_from((1, 2, 48, 10_000, 100_000)), max_size=3)), -1)
    if kind == "shape":
        return torch.zeros(draw(st.lists(st.sampled_from((0, 1, 2, 3, 16, 48)), max_size=5)))
    if kind == "sparse":
        dense = torch.eye(48)
        return draw(st.sampled_from((dense.to_sparse(), dense.to_sparse_csr())))
    if kind == "quantized":
        return torch.quantize_per_tensor(torch.zeros(48, 48), 0.1, 0, torch.qint8)
    if kind == "meta":
        return torch.zeros(draw(st.sampled_from((1, 10**6, 10**12))), device="meta")
    if kind == "nan":
        return torch.full((48, 48), draw(st.sampled_from((float("nan"), float("inf"), 3e38))))
    if kind == "strides":
        return torch.as_strided(torch.zeros(64), (8, 8), draw(st.sampled_from(((0, 0), (1, 1), (0, 1), (8, 1)))))
    return torch.nn.Parameter(torch.zeros(48))


# ---- safetensors


def _write(path: Path) -> None:
    write_checkpoint(path, "smallest")


@functools.cache
def headers() -> tuple[dict[str, Any], bytes]:
    """The header of a valid file, with what our own files say about themselves, and its data."""
    content = made_once("fuzz-weights.safetensors", _write).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def safetensors(draw: DrawFn) -> bytes:
    """Changed headers before the right data; sometimes a wrong length."""
    header, data = headers()
    kind = draw(st.sampled_from(("header", "tensor", "metadata", "bytes")))
    if kind == "metadata":
        own = draw(documents([json.loads(header["__metadata__"][METADATA_KEY])], (*TEXTS, *NUMBERS)))
        changed = as_json(header | {"__metadata__": {METADATA_KEY: as_json(own).decode("utf-8", "replace")}})
    elif kind == "tensor":
        name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        changed = as_json(header | {name: draw(documents([header[name]], (*SIZES, "F8_E4M3", "BF16", "I64", "U8")))})
    elif kind == "header":
        changed = as_json(draw(documents([header])))
    else:
        changed = draw(damaged([as_json(header)]))
    length = draw(st.sampled_from((len(changed),) * 8 + (0, 1, 7, len(changed) + 1, 100_000_001, 2**63, 2**64 - 1)))
    return struct.pack("<Q", length) + changed + (data if draw(st.integers(0, 9)) else data[: len(data) // 2])


@functools.cache
def whole_safetensors() -> bytes:
    """A valid file."""
    header, data = headers()
    content = as_json(header)
    return struct.pack("<Q", len(content)) + content + data


# ---- what lies beside weights

_CONFIG = {
    "architecture": "vit_tiny_patch16_224", "num_classes": 10,
    "model_args": {"img_size": 64, "embed_dim": 48, "depth": 2},
    "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9,
                       "interpolation": "bicubic", "crop_mode": "center", "label_names": ["a", "b"]},
    "label_names": [f"class {n}" for n in range(10)],
}  # fmt: skip
_TRANSFORMERS = {
    "model_type": "vit", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64,
    "patch_size": 16, "intermediate_size": 192, "id2label": {str(n): f"class {n}" for n in range(10)},
}  # fmt: skip
_OWN_WORDS = ("checkpoint_path", "hf_hub_id", "hf-hub:org/name", "local-dir:/etc", "/etc/passwd", "file", "url")


def _model() -> Mapping[str, bytes]:
    return {"model.safetensors": whole_safetensors()}


# ---- the two other pickles


@functools.cache
def _recipe() -> Any:
    return load_recipe(ROOT / "recipes" / "small.yaml")


def read_state(path: Path) -> Any:
    """What ``run --resume`` reads."""
    return StateFile(path, _recipe(), "dense").read()


@functools.cache
def states() -> tuple[bytes, ...]:
    """A valid one; what is in it is small."""
    text = json.dumps(asked(_recipe(), "dense"))
    return (pickled({"format": 1, "asked": text, "step": 3, "model": {"a": torch.zeros(4)}, "best": None}),)


@functools.cache
def maps() -> tuple[bytes, ...]:
    """Token labels of one image."""
    return (pickled(torch.stack((torch.rand(5, 3, 3), torch.full((5, 3, 3), 2.0))).half()),)


def _checkpoint_inputs() -> SearchStrategy[bytes]:
    return either(zips(pickles()), odd_states(), damaged(pickles(), _WORDS))


def _map_inputs() -> SearchStrategy[bytes]:
    return either(zips(maps()), damaged(maps(), _WORDS), _tensors().map(pickled))


FORMATS = (
    Format("checkpoint", "weights.pth", _checkpoint_inputs, read_weights_and_build),
    Format("safetensors", "weights.safetensors", lambda: either(safetensors(), damaged([whole_safetensors()])),
           read_weights_and_build),
    Format("config", "config.json", lambda: json_files([_CONFIG, _TRANSFORMERS], _OWN_WORDS),
           lambda path: read_weights_and_build(path.parent), _model),
    Format("training-state", "dense.state", lambda: either(zips(states()), damaged(states(), _WORDS)), read_state),
    Format("token-labels", "image.pt", _map_inputs, lambda path: read_token_labels(path, 10)),
)  # fmt: skip
