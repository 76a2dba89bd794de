"""DynamicViT from a released file to verified files; what is refused on the way."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.export.card import LOGITS, feeds, kept_name
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import QUANTIZED, set_precision
from evit_deploy.export.variants import slice_twin, with_indices
from evit_deploy.models.checkpoint import Checkpoint, build_model, read_checkpoint, resolve_tokens, save_checkpoint
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, token_plan
from tests.support.checkpoints import refusal, saved
from tests.support.models import KEEP, TINY, hollow, images, of_kind, preprocess_for, write_checkpoint

SPEC = TokenSpec(keep_rate=0.6, method="dynamicvit")


def with_predictors(model: Any, spec: TokenSpec = SPEC) -> Any:
    """Reduces a model; its predictors come from a seed and matter."""
    reduce_tokens_(model, spec)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in sorted(model.score_predictor.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            scaled = 1 + 0.2 * noise if "in_conv.0.weight" in name else 0.3 * noise
            value.copy_(1.5 * noise / value.shape[1] ** 0.5 if value.ndim == 2 else scaled)
    return model


def trained(path: Path, kind: str = "plain") -> Path:
    """A checkpoint of our own, predictors included."""
    model = with_predictors(of_kind(kind))
    about = Checkpoint(str(path), None, {}, "vit_tiny_patch16_224", TINY, tokens=SPEC, preprocess=preprocess_for(model))
    save_checkpoint(path, model, about)
    return path


# ---- released files

FORMS = {
    "deit-256": ("deit_small_patch16_224", {"embed_dim": 256, "num_heads": 4}),
    "deit-s": ("deit_small_patch16_224", {}),
    "deit-b": ("deit_base_patch16_224", {}),
    "lvvit-s": ("lvvit_s", {}),
    "lvvit-m": ("lvvit_m", {}),
}


def predictors(width: int) -> dict[str, torch.Tensor]:
    shapes = {
        "in_conv.0.weight": (width,), "in_conv.0.bias": (width,),
        "in_conv.1.weight": (width, width), "in_conv.1.bias": (width,),
        "out_conv.0.weight": (width // 2, width), "out_conv.0.bias": (width // 2,),
        "out_conv.2.weight": (width // 4, width // 2), "out_conv.2.bias": (width // 4,),
        "out_conv.4.weight": (2, width // 4), "out_conv.4.bias": (2,),
    }  # fmt: skip
    return {f"score_predictor.{i}.{name}": torch.zeros(s) for i in range(3) for name, s in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_released_file_is_recognized(tmp_path, form):
    name, args = FORMS[form]
    weights = hollow(name, **args)
    own = predictors(weights["cls_token"].shape[-1])
    content = {"model": weights | own, "args": argparse.Namespace(base_rate=0.7), "best": 79.3}
    checkpoint = read_checkpoint(saved(tmp_path, content))
    assert checkpoint.model == name
    assert checkpoint.model_args == {"num_classes": 1000, "img_size": 224} | args
    assert checkpoint.tokens == TokenSpec(keep_rate=0.7, fuse=False, method="dynamicvit")
    assert checkpoint.method_weights.keys() == own.keys()
    assert checkpoint.weights.keys() == weights.keys()
    spec, notes = resolve_tokens(checkpoint)
    assert (spec, notes) == (checkpoint.tokens, [])
    with torch.device("meta"):
        model: Any = timm.create_model(name, **checkpoint.model_args)
        model.method_weights = {key: value.to("meta") for key, value in checkpoint.method_weights.items()}
        reduce_tokens_(model, spec)
    depth = len(model.blocks)
    assert [row.block for row in token_plan(model).locations] == [depth // 4, depth // 2, 3 * depth // 4]


def test_a_width_of_256_without_predictors_is_taken_with_a_note(tmp_path):
    """How many heads such a model has cannot be seen; only one of DynamicViT's is known."""
    weights = hollow("deit_small_patch16_224", embed_dim=256, num_heads=4)
    checkpoint = read_checkpoint(saved(tmp_path, {"model": weights}))
    assert checkpoint.model_args["embed_dim"] == 256
    assert any("how many heads an attention has; 4 are assumed, 64 wide" in note for note in checkpoint.notes)


def test_the_rate_has_to_be_said_where_the_file_does_not(tmp_path, cli):
    path = saved(tmp_path, {"model": hollow("deit_tiny_patch16_224") | predictors(192)})
    checkpoint = read_checkpoint(path)
    assert checkpoint.tokens == TokenSpec(fuse=False, method="dynamicvit")
    assert resolve_tokens(checkpoint, keep_rate=0.6)[0] == TokenSpec(keep_rate=0.6, fuse=False, method="dynamicvit")
    cli("convert", path).refused(2, "a keep rate is needed: the checkpoint does not contain one", "--keep-rate 0.7")


@pytest.mark.parametrize("rate", ["much", 0.0, 1.5, float("nan"), [0.7]])
def test_a_rate_that_makes_no_sense(tmp_path, rate):
    content = {
        "model": hollow("deit_tiny_patch16_224") | predictors(192), "args": argparse.Namespace(base_rate=rate)
    }  # fmt: skip
    message = refusal(saved(tmp_path, content))
    assert "DynamicViT arguments make no sense" in message
    assert "base_rate" in message


def test_our_own_file_gives_the_same_model(tmp_path):
    path = trained(tmp_path / "own.safetensors")
    checkpoint = read_checkpoint(path)
    assert checkpoint.tokens == SPEC
    model = reduce_tokens_(build_model(checkpoint), SPEC)
    wanted = with_predictors(of_kind("plain"))
    inputs = torch.from_numpy(images(wanted, 3))
    with torch.inference_mode():
        assert torch.equal(model(inputs), wanted(inputs))
    assert model.state_dict().keys() == wanted.state_dict().keys()


# ---- export


@pytest.mark.parametrize("linear", ["gemm", "matmul"])
@pytest.mark.parametrize("kind", ["plain", "distilled", "LV-ViT"])
def test_the_exported_file_is_the_model(kind, linear):
    model = with_predictors(of_kind(kind))
    proto = export_onnx(model, name=kind, preprocess=preprocess_for(model), linear=linear)
    session = onnxruntime.InferenceSession(with_indices(proto).SerializeToString())
    for batch in (1, 3, 8):
        inputs = images(model, batch)
        with capture(model) as seen:
            wanted = model(torch.from_numpy(inputs)).numpy()
        names = [LOGITS, *(kept_name(row.block) for row in token_plan(model).locations)]
        logits, *kept = session.run(names, feeds(inputs))
        np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())
        for found, expected in zip(kept, seen.kept, strict=True):
            np.testing.assert_array_equal(found, expected.numpy())
    twin = onnxruntime.InferenceSession(slice_twin(proto).SerializeToString())
    (sliced,) = twin.run([LOGITS], feeds(images(model, 3)))
    assert np.isfinite(sliced).all()
    assert "score_predictor" not in " ".join(node.name for node in slice_twin(proto).graph.node)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_predictors_compute_in_the_network_s_precision_and_scores_in_fp32(precision):
    model = with_predictors(of_kind("plain"))
    proto = export_onnx(model, name="plain", preprocess=preprocess_for(model))
    calibration = images(model, 8) if precision in QUANTIZED else None
    low = set_precision(proto, precision, base="fp16", calibration=calibration)
    types = {tensor.name: tensor.data_type for tensor in low.graph.initializer}
    wanted = 16 if precision == "bf16" else 10  # ONNX's numbers of the types
    if precision not in QUANTIZED:
        assert types["score_predictor.0.in_conv.1.weight"] == types["blocks.0.mlp.inner.fc1.weight"] == wanted
    (score,) = [node.input[1] for node in low.graph.node if node.name == "blocks.1.token_reorg"]
    (maker,) = [node for node in low.graph.node if score in node.output]
    assert maker.op_type in ("Reshape", "Add")
    inferred = {value.name: value.type.tensor_type.elem_type for value in low.graph.value_info}
    assert inferred[score] == 1
    if precision == "fp16":
        inputs = images(model, 3)
        with torch.inference_mode():
            exact = model(torch.from_numpy(inputs)).numpy()
        (logits,) = onnxruntime.InferenceSession(low.SerializeToString()).run([LOGITS], feeds(inputs))
        np.testing.assert_allclose(logits, exact, atol=0.02 * np.abs(exact).max())


# ---- the command line


def test_convert_to_verified_files(tmp_path, cli):
    path = trained(tmp_path / "own.safetensors")
    result = cli("convert", path, "--target", "onnx", "--target", "openvino", "--with-indices", "--threads", 1)
    assert result.code == 0, result.err
    bundle = read_bundle(tmp_path / "own-dynamicvit-k0.6")
    assert bundle.manifest.kind == "dynamicvit"
    assert bundle.manifest.tokens == TokenSpec(keep_rate=0.6, fuse=False, method="dynamicvit")
    assert bundle.manifest.results["passed"] is True
    again = cli("verify", bundle.path, "--threads", 1)
    assert again.code == 0, again.err
    assert "eager" in again.out  # the checkpoint is still there, predictors included


def test_what_the_command_line_refuses(tmp_path, cli):
    dense, own = write_checkpoint(tmp_path / "dense.safetensors"), trained(tmp_path / "own.safetensors")
    reduced = write_checkpoint(tmp_path / "evit.safetensors", tokens=KEEP)
    untrained = cli("convert", dense, "--method", "dynamicvit", "--keep-rate", 0.7)
    untrained.refused(
        2, "decides by its own layers", "0.7.yaml --set model.name=null --set", "tokens.method=dynamicvit"
    )
    cli("convert", own, "--fuse").refused(2, "--fuse", "no fused token")
    cli("convert", own, "--method", "evit").refused(2, "trained with the method 'dynamicvit'")
    cli("convert", reduced, "--method", "dynamicvit").refused(2, "trained with the method 'evit'")
    cli("convert", own, "--locations", "1,2").refused(2, "the number of locations is not")
    cli("convert", own, "--locations", "1,2,9").refused(2, "outside the model")
    cli("convert", own, "--keep-rate", "0.9,0.8").refused(2, "numbers of keep rates and locations differ")
    cli("convert", own, "--keep-rate", "0.1").refused(2, "no patch is left")
    assert {path.name for path in tmp_path.iterdir()} == {"dense.safetensors", "own.safetensors", "evit.safetensors"}
