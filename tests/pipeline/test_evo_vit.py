"""Evo-ViT through ``convert``: a released file without a flag, two targets, a bundle that passes its own gates."""

from pathlib import Path

import pytest
import torch

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.models.layouts.evo_vit import to_released
from evit_deploy.tokens.plan import TokenSpec
from tests.support.models import TINY, seeded


def released(path: Path) -> Path:
    """A file as the authors' training writes it: DeiT-Ti's width and depth, a small image."""
    model = seeded("deit_tiny_patch16_224", **(TINY | {"embed_dim": 192, "depth": 12, "global_pool": "avg"}))
    second = {"norm_cls.weight": torch.ones(192), "norm_cls.bias": torch.zeros(192),
              "head_cls.weight": torch.ones(10, 192), "head_cls.bias": torch.zeros(10)}  # fmt: skip
    torch.save({"model": to_released(model.state_dict()) | second}, path)
    return path


@pytest.mark.openvino
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_convert_to_verified_files_without_a_flag(tmp_path, cli, precision):
    path = released(tmp_path / "evo.pth")
    targets = ("--target", "onnx", *(("--target", "openvino") if precision == "fp32" else ()))
    result = cli("convert", path, *targets, "--precision", precision, "--with-indices", "--threads", 1)
    assert result.code == 0, result.err
    bundle = read_bundle(tmp_path / "evo-evo-vit-k0.5")
    assert bundle.manifest.kind == "evo-vit"
    assert bundle.manifest.tokens == TokenSpec(keep_rate=0.5, fuse=False, method="evo-vit")
    assert bundle.manifest.results["passed"] is True
    assert b"head_cls" not in bundle.file("model.onnx").read_bytes()
    again = cli("verify", bundle.path, "--threads", 1)
    assert again.code == 0, again.err
    assert "eager" in again.out  # the checkpoint is still there


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "evit", "--keep-rate", 0.7), "this checkpoint was trained with the method 'evo-vit'"),
        (("--locations", "0,4"), "block 0 cannot sort its patches"),
        (("--keep-rate", 0.01), "no patch would be informative"),
        (("--fuse",), "the method 'evo-vit' has no fused token"),
        (("--model", "deit_tiny_distilled_patch16_224"), "the weights are not those of deit_tiny_distilled"),
    ],
)
def test_what_it_cannot_be_converted_with(tmp_path, cli, flags, words):
    cli("convert", released(tmp_path / "evo.pth"), *flags).refused(2, words)
