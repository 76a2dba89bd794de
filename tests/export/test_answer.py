"""What models answer: names and sizes, and embeddings scaled to length 1, in PyTorch and in exported files."""

import copy

import numpy as np
import onnx
import pytest
import torch

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_in, answer_name, answer_size, is_normalized, normalize_
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import set_precision
from evit_deploy.models.create import create_model
from evit_deploy.tokens.backbone import backbone_of, load_backbones
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_
from tests.support.exports import answers
from tests.support.models import KEEP, TINY, images, preprocess_for, seeded

load_backbones()

LEVIT = {"img_size": 64, "num_classes": 0}
WITHOUT_CLASSES = {
    "plain": ("vit_tiny_patch16_224", TINY | {"num_classes": 0}),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY | {"num_classes": 0}),
    "LV-ViT": ("lvvit_s", TINY | {"num_classes": 0}),
    "LeViT": ("levit_128s", {"num_classes": 0}),
    "Evo-LeViT": ("evo_levit_128s", LEVIT),
}
each = pytest.mark.parametrize("kind", WITHOUT_CLASSES)


def without_classes(kind: str):
    name, model_args = WITHOUT_CLASSES[kind]
    return seeded(name, **model_args)


def projected(width: int = 20):
    """A model whose embedding is a projection of its features, as CLIP's is."""
    model = create_model("vit_tiny_patch16_224", TINY | {"num_classes": 0, "projection": width})
    model.load_state_dict(seeded("vit_tiny_patch16_224", **TINY | {"num_classes": 0}).state_dict(), strict=False)
    return model.eval()


@torch.inference_mode()
def run(model, inputs):
    return model(torch.from_numpy(inputs)).numpy()


@each
def test_a_model_without_classes_answers_with_an_embedding(kind):
    model = without_classes(kind)
    assert answer_name(model) == "embedding"
    assert run(model, images(model, 2)).shape == (2, answer_size(model))


def test_a_projection_is_no_classifier():
    model = projected()
    assert (answer_name(model), answer_size(model), model.head.bias) == ("embedding", 20, None)
    assert run(model, images(model, 2)).shape == (2, 20)
    model.reset_classifier(7)
    assert (answer_name(model), answer_size(model)) == ("logits", 7)


def test_an_output_is_found_by_its_name():
    assert answer_in(("kept_2", "embedding")) == "embedding"
    assert answer_in({"logits": 1, "kept_2": 2}) == "logits"


@each
def test_normalized_in_pytorch(kind):
    model = without_classes(kind)
    inputs = images(model, 3)
    plain = run(model, inputs)
    normalize_(model)
    normalize_(model)  # once more changes nothing
    assert is_normalized(model)
    np.testing.assert_allclose(
        run(model, inputs), plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=0, atol=1e-6
    )


def test_copies_and_twins_are_normalized_too():
    model = reduce_tokens_(projected(), KEEP)
    keys = set(model.state_dict())
    normalize_(model)
    assert set(model.state_dict()) == keys
    for other in (copy.deepcopy(model), dense_twin(model), reduce_tokens_(copy.deepcopy(model), TokenSpec(0.8))):
        assert is_normalized(other)
        lengths = np.linalg.norm(run(other, images(model, 2)), axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=0, atol=1e-6)


def test_logits_are_not_normalized():
    with pytest.raises(InputError, match=r"--normalize: logits cannot be normalized.*10 classes"):
        normalize_(seeded())


def test_a_vector_of_zeros_stays_one():
    model = projected()
    torch.nn.init.zeros_(model.head.weight)
    normalize_(model)
    assert (run(model, images(model, 1)) == 0).all()


@each
def test_normalized_in_the_file(kind):
    model = without_classes(kind)
    normalize_(model)
    size = backbone_of(model).image_size(model)  # timm says another of its LeViTs
    preprocess = Preprocess.from_model(model, size[0])
    proto = export_onnx(model, name=WITHOUT_CLASSES[kind][0], preprocess=preprocess)
    (output,) = proto.graph.output
    assert output.name == "embedding"
    inputs = images(model, 3)
    np.testing.assert_allclose(answers(proto, inputs)["embedding"], run(model, inputs), rtol=0, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_length_is_taken_in_fp32(precision):
    """Squares of numbers beyond 256 are infinite in FP16."""
    model = projected()
    with torch.no_grad():
        model.head.weight *= 600
    plain = run(model, images(model, 2))
    assert np.linalg.norm(plain, axis=1).min() > 1000
    normalize_(model)
    low = copy.deepcopy(model).to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision])
    with torch.inference_mode():
        found = low(torch.from_numpy(images(model, 2)).to(next(low.parameters()).dtype))
    assert found.dtype == torch.float32
    proto = export_onnx(model, name="vit_tiny_patch16_224", preprocess=preprocess_for(model))
    file = set_precision(proto, precision)
    inferred = onnx.shape_inference.infer_shapes(file)
    types = {info.name: info.type.tensor_type.elem_type for info in (*inferred.graph.value_info, *file.graph.output)}
    steps = [node for node in file.graph.node if node.name.startswith("normalize/")]
    assert {"ReduceL2", "Div"} <= {node.op_type for node in steps}
    assert {types[name] for node in steps for name in node.output} == {onnx.TensorProto.FLOAT}
    low_products = [node for node in file.graph.node if node.op_type == "Gemm"]
    assert onnx.TensorProto.FLOAT not in {types[name] for node in low_products for name in node.output}
    np.testing.assert_allclose(torch.linalg.norm(found, dim=1).numpy(), 1, rtol=0, atol=1e-5)
    if precision == "fp16":  # ONNX Runtime's CPU computes no BF16
        got = answers(file, images(model, 2))["embedding"]
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got, run(model, images(model, 2)), rtol=0, atol=5e-3)
