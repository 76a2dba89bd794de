"""Reading tensors out of files: every wrapper and format, and every kind of file that is none."""

import argparse
import os
import pickle
import struct
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from evit_deploy.errors import CheckpointError
from evit_deploy.models.files.safe_weights import read_weights

TENSORS = {
    "cls_token": torch.arange(4.0).reshape(1, 1, 4),
    "blocks.0.norm1.weight": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "head.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "steps": torch.tensor(7),
}
OTHER = {name: value + 1 for name, value in TENSORS.items()}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in TENSORS.items()}


def assert_tensors(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor] = TENSORS) -> None:
    assert list(weights) == list(wanted)
    for name, value in wanted.items():
        assert weights[name].dtype == value.dtype
        assert torch.equal(weights[name], value), name


def saved(folder: Path, content: Any, name: str = "weights.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def refusal(path: Path) -> str:
    """Why a file is refused; the message must name the file, and be one line."""
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert message.endswith((".", "?", "!"))
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_wrapped_weights(tmp_path, wrapper):
    weights = read_weights(saved(tmp_path, {wrapper: TENSORS, "epoch": 29}))
    assert_tensors(weights.tensors)
    assert weights.notes == []


@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_bare_weights(tmp_path, container):
    weights = read_weights(saved(tmp_path, container(TENSORS)))
    assert_tensors(weights.tensors)
    assert weights.args is None


def test_parameters_count_as_tensors(tmp_path):
    # nn.Parameter is what a hand-made dictionary of weights often holds
    parameters = {name: nn.Parameter(value) for name, value in TENSORS.items() if value.is_floating_point()}
    weights = read_weights(saved(tmp_path, {"model": parameters}))
    assert list(weights.tensors) == list(parameters)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "model"])
def test_prefixes_of_training_wrappers_are_removed(tmp_path, prefix, wrapper):
    content = prefixed(prefix) if wrapper is None else {wrapper: prefixed(prefix)}
    assert_tensors(read_weights(saved(tmp_path, content)).tensors)


def test_prefixes_are_removed_from_safetensors_too(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(prefixed("module."), path)
    assert read_weights(path).tensors.keys() == TENSORS.keys()


def test_a_prefix_that_not_all_have_stays(tmp_path):
    content = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(read_weights(saved(tmp_path, content)).tensors) == ["module.a", "b"]


@pytest.mark.parametrize(
    ("used", "left"), [("model", "model_ema"), ("state_dict_ema", "state_dict"), ("model", "state_dict")]
)
def test_of_two_sets_the_evaluated_one_is_used_and_that_is_said(tmp_path, used, left):
    # DeiT and EViT evaluate `model`; timm's trainer evaluates `state_dict_ema`
    for order in ((used, left), (left, used)):
        content = {name: TENSORS if name == used else OTHER for name in order}
        weights = read_weights(saved(tmp_path, content))
        assert_tensors(weights.tensors)
        assert len(weights.notes) == 1
        assert f"{used!r} is used" in weights.notes[0]
        assert left in weights.notes[0]


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.pth.tar", "w.bin", "w.ckpt", "weights"])
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_pickle_formats_under_any_name(tmp_path, name, as_zip):
    path = saved(tmp_path, {"state_dict": TENSORS}, name, _use_new_zipfile_serialization=as_zip)
    assert path.read_bytes().startswith(b"PK") == as_zip
    assert_tensors(read_weights(path).tensors)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_safetensors_under_any_name(tmp_path, name):
    safetensors.torch.save_file(TENSORS, tmp_path / name, metadata={"format": "pt"})
    weights = read_weights(tmp_path / name)
    assert weights.metadata == {"format": "pt"}
    assert weights.tensors.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert torch.equal(weights.tensors[key], value)


def test_args_of_the_training_script(tmp_path):
    args = argparse.Namespace(base_keep_rate=0.7, drop_loc="(3, 6, 9)")
    assert vars(read_weights(saved(tmp_path, {"model": TENSORS, "args": args})).args) == vars(args)
    assert read_weights(saved(tmp_path, {"model": TENSORS, "args": vars(args)})).args == vars(args)


def test_half_precision_and_sharing_are_kept(tmp_path):
    tied = torch.ones(2, 2, dtype=torch.float16)
    weights = read_weights(saved(tmp_path, {"a": tied, "b": tied, "c": torch.ones(3, dtype=torch.bfloat16)}))
    assert [value.dtype for value in weights.tensors.values()] == [torch.float16, torch.float16, torch.bfloat16]


# What is no checkpoint.


def test_a_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pth")


def test_a_folder(tmp_path):
    (tmp_path / "weights.pth").mkdir()
    assert "a folder" in refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    assert "empty" in refusal(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_an_unreadable_file(tmp_path):
    path = saved(tmp_path, TENSORS)
    path.chmod(0)
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_a_pickle_cut_short(tmp_path, as_zip, share):
    path = saved(tmp_path, {"model": TENSORS}, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    path.write_bytes(content[: max(int(share * len(content)), 5)])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("letters", range(1, 12))
def test_a_pickle_cut_short_in_the_name_of_a_class(tmp_path, letters):
    path = saved(tmp_path, {"model": TENSORS}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"torch\nFloatStorage") + 6 + letters])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("length", [4, 8, 40, -1])
def test_safetensors_cut_short(tmp_path, length):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:length])
    assert "not a whole safetensors file" in refusal(path)


def test_safetensors_whose_header_claims_more_than_there_is(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "not a whole safetensors file" in refusal(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_plain_text(tmp_path, name):
    (tmp_path / name).write_text("<!DOCTYPE html><title>404 Not Found</title>")
    assert "not a" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 88273123\n")
    assert "git lfs pull" in refusal(tmp_path / name)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_payload_is_not_run(tmp_path, as_zip):
    marker = tmp_path / "ran"
    content = {"model": TENSORS, "extra": Payload(marker)}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=as_zip)
    message = refusal(path)
    assert "posix.system" in message
    assert "was not run" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert marker.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_payload_in_a_bare_pickle_is_not_run(tmp_path, protocol):
    marker, path = tmp_path / "ran", tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"extra": Payload(marker)}, protocol))
    refusal(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_whole_pickled_module(tmp_path, as_zip):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(tmp_path, nn.Sequential(nn.Linear(2, 2)), _use_new_zipfile_serialization=as_zip)
    message = refusal(path)
    assert "whole pickled model" in message
    assert "state_dict()" in message


def test_a_torchscript_archive(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "weights.pt"))
    assert "TorchScript" in refusal(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), "text", 3], ids=["list", "tensor", "str", "int"])
def test_something_else_than_a_dictionary(tmp_path, content):
    assert "not a dictionary of weights" in refusal(saved(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, {"model": {}}, {"model": {"a": 1}}, {"net": TENSORS}, {"model": [torch.ones(1)]}],
    ids=["empty", "no tensors", "empty model", "numbers", "unknown wrapper", "list"],
)
def test_a_dictionary_without_weights(tmp_path, content):
    assert "no weights in it" in refusal(saved(tmp_path, content))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    broken = TENSORS | {"head.weight": torch.tensor([[1.0, value]])}
    assert "head.weight" in refusal(saved(tmp_path, {"model": broken}))
    safetensors.torch.save_file(broken, tmp_path / "w.safetensors")
    assert "head.weight" in refusal(tmp_path / "w.safetensors")


def test_random_bytes_never_end_in_another_error(tmp_path):
    random = torch.Generator().manual_seed(0)
    whole = saved(tmp_path, {"model": TENSORS}, _use_new_zipfile_serialization=False).read_bytes()
    whole_zip = saved(tmp_path, {"model": TENSORS}).read_bytes()
    path = tmp_path / "damaged.pth"
    refused = 0
    for content in (whole, whole_zip):
        for _ in range(60):
            damaged = bytearray(content)
            for place in torch.randint(len(content), (4,), generator=random).tolist():
                damaged[place] = int(torch.randint(256, (1,), generator=random))
            path.write_bytes(damaged)
            try:
                read_weights(path)  # damage inside a tensor's bytes cannot be seen
            except CheckpointError:
                refused += 1
    assert refused > 20
