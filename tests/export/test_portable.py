"""The portable file: what stands in it, that it answers like PyTorch at every batch size, and its two twins."""

import msgspec
import numpy as np
import onnx
import pytest
import torch

from evit_deploy.environment.machine import versions
from evit_deploy.errors import InputError, StageError
from evit_deploy.export.answer import answer_in, answer_name
from evit_deploy.export.card import INPUT, ModelCard, kept_name, load_onnx, read_card
from evit_deploy.export.portable import OPSET, export_onnx
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.operators.token_reorg import DOMAIN, NAME
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, dense_twin, token_plan, token_spec
from tests.support import exporter
from tests.support.exports import (
    answers,
    assert_close,
    attributes,
    copied,
    each,
    exported,
    nodes,
    operators,
    reduced,
    shape,
)
from tests.support.models import KINDS, images, of_kind, preprocess_for

BATCHES = (1, 2, 3, 5, 7)


# What stands in the file.


@each
def test_the_file_is_valid(kind, spec):
    proto = exported(kind, spec)
    onnx.checker.check_model(proto, full_check=True)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    assert opsets == {"": OPSET, DOMAIN: 1}
    assert len(proto.opset_import) == 2
    assert {node.domain for node in proto.graph.node} == {"", DOMAIN}
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert proto.producer_name == "evit-deploy"


@each
def test_one_input_and_one_output(kind, spec):
    proto, model = exported(kind, spec), of_kind(kind)
    (given,), (answer,) = proto.graph.input, proto.graph.output
    assert (given.name, answer.name) == (INPUT, "embedding" if kind == "registers, no classes" else "logits")
    channels, size = backbone_of(model).channels(model), model.patch_embed.img_size
    batch, *rest = shape(given)
    assert isinstance(batch, str)
    assert rest == [channels, *size]
    assert shape(answer) == [batch, model.num_classes or model.num_features]
    assert {given.type.tensor_type.elem_type, answer.type.tensor_type.elem_type} == {onnx.TensorProto.FLOAT}


@each
def test_one_attention_a_block_in_three_dimensions(kind, spec):
    proto, model = exported(kind, spec), of_kind(kind)
    found = nodes(proto, "Attention")
    assert len(found) == len(model.blocks)
    heads = model.blocks[0].attn.num_heads
    ranks = {info.name: len(shape(info)) for info in proto.graph.value_info}
    for node in found:
        assert attributes(node)["q_num_heads"] == attributes(node)["kv_num_heads"] == heads
        assert attributes(node)["scale"] == pytest.approx(model.blocks[0].attn.scale)
        assert [ranks[name] for name in node.input if name] == [3, 3, 3]
        assert [name for name in node.output if name] == [node.output[0]]  # the attention map is not read out
    assert len(nodes(proto, "Gelu")) == len(model.blocks)
    assert not {"Split", "If", "Loop"} & set(operators(proto))
    sizes = {name for node in nodes(proto, "Shape") for name in node.output}  # older exporters squeeze the batch size
    assert {name for node in nodes(proto, "Squeeze") for name in node.input[:1]} <= sizes


@each
def test_one_token_reorg_a_location(kind, spec):
    proto, plan = exported(kind, spec), token_plan(reduced(kind, spec))
    found = [node for node in proto.graph.node if node.domain == DOMAIN]
    assert [node.name for node in found] == [f"blocks.{row.block}.token_reorg" for row in plan.locations]
    for node, row in zip(found, plan.locations, strict=True):
        assert node.op_type == NAME
        assert attributes(node) == {
            "keep": row.keep,
            "fuse": int(row.fused),
            "prefix": plan.prefix,
            "plugin_version": "1",
            "plugin_namespace": "evit",
        }
        assert node.output == [f"blocks.{row.block}.tokens", kept_name(row.block)]  # both named, or plugins do not load
        assert len(node.input) == 2


@each
def test_the_functions_body_is_there_once(kind, spec):
    (function,) = exported(kind, spec).functions
    assert (function.domain, function.name) == (DOMAIN, NAME)
    assert sorted(function.attribute) == ["fuse", "keep", "prefix"]
    assert function.node[-1].op_type == "Cast"


def test_names_are_unique():
    graph = exported("plain").graph
    values = [name for node in graph.node for name in node.output if name]
    assert len(values) == len(set(values))
    names = [node.name for node in graph.node]
    assert len(names) == len(set(names))


@each
def test_the_card_says_what_the_file_is(kind, spec):
    proto, model = exported(kind, spec), reduced(kind, spec)
    card = ModelCard("reduced", KINDS[kind][0], spec, token_plan(model), preprocess_for(model), "fp32", versions())
    assert read_card(proto) == card
    assert read_card(onnx.load_from_string(proto.SerializeToString())) == card


def test_a_card_of_somebody_else_or_damaged():
    assert read_card(onnx.parser.parse_model(_IDENTITY)) is None
    for field in msgspec.structs.fields(ModelCard):
        proto = copied(exported("plain"))
        for entry in proto.metadata_props:
            if entry.key == f"evit_deploy.{field.name}" and field.type is not str:
                entry.value = "{"
                assert read_card(proto) is None
        kept = [entry for entry in proto.metadata_props if entry.key != f"evit_deploy.{field.name}"]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
        assert (read_card(proto) is None) == field.required


_IDENTITY = '<ir_version: 10, opset_import: ["": 23]> g (float[N] x) => (float[N] y) { y = Identity(x) }'


# What it answers.


@each
def test_it_answers_like_pytorch_at_every_batch_size(kind, spec):
    proto, model = exported(kind, spec), reduced(kind, spec)
    inputs = images(model, max(BATCHES))
    with capture(model) as seen:
        model(torch.from_numpy(inputs))
    with OnnxRuntimeRunner(proto, threads=1, with_indices=True) as runner:
        for batch in BATCHES:
            outputs = runner.infer({INPUT: inputs[:batch]})
            assert_close(outputs[answer_in(outputs)], model, inputs[:batch])
            for row, kept in zip(token_plan(model).locations, seen.kept, strict=True):
                found = outputs[kept_name(row.block)]
                assert found.dtype == np.int32
                np.testing.assert_array_equal(found, kept[:batch].numpy())


def test_images_of_a_batch_do_not_see_each_other():
    proto, inputs = exported("plain"), images(of_kind("plain"), 3)
    together = answers(proto, inputs, indices=True)
    for i in range(3):
        alone = answers(proto, inputs[i : i + 1], indices=True)
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][i], value[0], rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_part_in_the_answer():
    # the comparison above proves little if the seeded model ignores what might be lost on the way
    model, inputs = reduced("layer scale"), torch.from_numpy(images(of_kind("layer scale"), 2))
    with torch.no_grad():
        before = model(inputs)
        for name, parameter in model.named_parameters():
            saved = parameter.clone()
            parameter.mul_(1.5)
            changed = (model(inputs) - before).abs().max()
            parameter.copy_(saved)
            if "qkv.bias" not in name:  # its middle third, the keys' bias, cancels in the softmax
                assert changed > 1e-3, name
        assert torch.equal(model(inputs), before)


def test_exporting_leaves_the_model_alone(monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", exporter.export)  # whether it was exported before or not
    model = reduced("plain").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan, spec, blocks = token_plan(model), token_spec(model), [type(block.attn) for block in model.blocks]
    export_onnx(dense_twin(model), name="x", preprocess=preprocess_for(model))
    export_onnx(model, name="x", preprocess=preprocess_for(model))
    assert (token_plan(model), token_spec(model)) == (plan, spec)
    assert [type(block.attn) for block in model.blocks] == blocks
    assert model.training
    assert all(block.training for block in model.blocks)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# The dense twin.


@pytest.mark.parametrize("kind", ["plain", "registers, no classes"])
def test_the_dense_twin_is_the_dense_model(kind):
    twin, model = exported(kind, None), of_kind(kind)
    onnx.checker.check_model(twin, full_check=True)
    assert {entry.domain for entry in twin.opset_import} == {""}
    assert not twin.functions
    assert len(nodes(twin, "Attention")) == len(model.blocks)
    inputs = images(model, 3)
    assert_close(answers(twin, inputs)[answer_name(model)], model, inputs)
    card = read_card(twin)
    assert card is not None
    assert (card.kind, card.plan) == ("dense", token_plan(model))
    assert card.plan.locations == ()


# What is refused.


@pytest.mark.parametrize("method", ["random", "inverse", "slice"])
def test_methods_without_an_exported_form(method):
    model = reduced("plain", TokenSpec(keep_rate=0.6, method=method))
    with pytest.raises(InputError, match=f"'{method}' has no exported form"):
        export_onnx(model, name="x", preprocess=preprocess_for(model))


def test_a_preprocessing_of_another_size():
    model = reduced("plain")
    other = msgspec.structs.replace(preprocess_for(model), size=(224, 224))
    with pytest.raises(InputError, match="size does not match"):
        export_onnx(model, name="x", preprocess=other)


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x0a", b"\xff" * 64])
def test_files_that_are_no_model(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx.*not an ONNX model"):
        load_onnx(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="no such file"):
        load_onnx(tmp_path / "absent.onnx")


def test_a_model_that_onnx_runtime_refuses():
    broken = copied(exported("plain"))
    del broken.functions[:]
    with pytest.raises(StageError, match="ONNX Runtime refuses"), OnnxRuntimeRunner(broken):
        pass


def test_an_input_that_does_not_fit():
    with (
        OnnxRuntimeRunner(exported("plain"), threads=1) as runner,
        pytest.raises(StageError, match="ONNX Runtime failed"),
    ):
        runner.infer({INPUT: np.zeros((1, 3, 64, 64), np.float32)})
