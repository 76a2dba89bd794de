"""Arguments of an architecture are a list with ranges; what is larger than its weights is never built."""

import re
from pathlib import Path

import msgspec
import pytest
import safetensors
import safetensors.torch
import torch

from evit_deploy.errors import CheckpointError, InputError
from evit_deploy.models.checkpoint import METADATA_KEY, Checkpoint, build_model, read_checkpoint
from evit_deploy.models.create import create_model
from tests.support.models import KINDS, of_kind

NAME = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"checkpoint_path": "/etc/passwd"}, "not where timm loads one from .got checkpoint_path"),
        ({"pretrained": True}, "not where timm loads one from"),
        ({"pretrained_cfg": {"file": "x"}}, "not where timm loads one from"),
        ({"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}}, "not where timm loads one from"),
        ({"features_only": True}, "not where timm loads one from"),
        ({"embed_dims": 96}, "unknown argument of an architecture .got 'embed_dims'.*Did you mean 'embed_dim'"),
        ({"": 1}, "unknown argument of an architecture"),
        ({"depth": 100_000}, "depth"),
        ({"depth": 0}, "depth"),
        ({"embed_dim": 10**9}, "embed_dim"),
        ({"embed_dim": "96"}, "embed_dim"),
        ({"embed_dim": 96.5}, "embed_dim"),
        ({"img_size": -224}, "img_size"),
        ({"img_size": [224, 224, 224]}, "img_size"),
        ({"num_classes": 10**12}, "num_classes"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"qkv_bias": "no"}, "qkv_bias"),
        ({"act_layer": "__import__('os')"}, "act_layer"),
        ({"global_pool": "evil"}, "global_pool"),
    ],
)
def test_arguments_out_of_range_are_refused(args, said):
    with pytest.raises(CheckpointError, match=said):
        create_model(NAME, args)


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:/etc", "hf_hub:a/b"])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(CheckpointError, match="not where timm loads one from"):
        create_model(name, {})


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_every_kind_of_model_are_taken(kind):
    name, args = KINDS[kind]
    assert create_model(name, args).state_dict().keys() == of_kind(kind).state_dict().keys()


def test_a_model_that_is_larger_than_its_weights_is_not_built():
    """4 GB of parameters for one number."""
    args = {"embed_dim": 4096, "depth": 24, "num_heads": 16, "num_classes": 10}
    checkpoint = Checkpoint("x.pth", None, {"cls_token": torch.zeros(1, 1, 4096)}, NAME, args)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process begins anew
    before = _peak()
    with pytest.raises(CheckpointError, match="the weights do not fit the architecture"):
        build_model(checkpoint)
    assert _peak() - before < 1 << 20


def _peak() -> int:
    """The most memory of this process, in kB."""
    return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "metadata of a format that is not known .got 99"),
        ({"format": "1"}, "metadata of a format that is not known"),
        ({"model": "hf-hub:org/name"}, "model"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "not where timm loads one from"),
        ({"preprocess": {"size": [96, 96], "std": [0, 0, 0]}}, "std"),
        ({"preprocess": {"size": [96, 96], "interpolation": "evil"}}, "interpolation"),
        ({"labels": ["a\x00b"]}, "label"),
        ({"tokens": {"keep_rate": 7}}, "keep rate"),
    ],
)
def test_metadata_of_our_own_is_not_believed_either(tmp_path, checkpoint_file, change, said):
    with safetensors.safe_open(checkpoint_file, framework="pt") as file:
        text = file.metadata()[METADATA_KEY]
    metadata = {METADATA_KEY: msgspec.json.encode(msgspec.json.decode(text) | change).decode()}
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(checkpoint_file), path, metadata)
    with pytest.raises(InputError, match=said):
        build_model(read_checkpoint(path))
