"""INT8 and FP8: where the Q/DQ pairs stand, what their scales are, and how much noise they make."""

import logging

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from evit_deploy.errors import InputError, StageError
from evit_deploy.export.answer import answer_in
from evit_deploy.export.card import INPUT, read_card
from evit_deploy.export.portable import OPSET
from evit_deploy.export.precision import set_precision
from evit_deploy.export.quantization import layer_of, layers_like, quantize
from evit_deploy.export.variants import reorganizations
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.operators.token_reorg import DOMAIN, NAME
from evit_deploy.verification.golden import make_golden
from tests.support.exports import answers, calibration_of, copied, exported, lowered, nodes, reduced
from tests.support.models import KINDS, images, of_kind

LARGEST = {"int8": 127, "fp8": 448}
KIND = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
quantized = pytest.mark.parametrize("precision", ["int8", "fp8"])
based = pytest.mark.parametrize(("precision", "base"), [(p, b) for p in LARGEST for b in ("fp32", "fp16", "bf16")])
each_file = pytest.mark.parametrize(
    ("kind", "precision", "base"),
    [(kind, precision, "fp32") for kind in KINDS for precision in LARGEST]
    + [("plain", precision, base) for precision in LARGEST for base in ("fp16", "bf16")],
)
each_fp32_file = pytest.mark.parametrize(("kind", "precision"), [(k, p) for k in KINDS for p in LARGEST])


def arrays(proto: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def makers(proto: ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in proto.graph.node for output in node.output}


def for_cpu(precision: str, base: str = "fp32") -> bool:
    """Whether activations are unsigned with a zero point and biases quantized, as CPUs have it."""
    return precision == "int8" and base == "fp32"


def observed(kind: str, names: list[str], inputs: np.ndarray) -> dict[str, tuple[float, float]]:
    """Smallest and largest of some values of the FP32 file, and zero, over all inputs at once."""
    spied = copied(exported(kind))
    infos = {info.name: info for info in spied.graph.value_info}
    spied.graph.output.extend(infos[name] for name in names)
    with OnnxRuntimeRunner(spied, threads=1) as runner:
        found = runner.infer({INPUT: inputs})
    return {name: (min(float(found[name].min()), 0), max(float(found[name].max()), 0)) for name in names}


def scale_of(limits: tuple[float, float], precision: str, base: str = "fp32") -> float:
    low, high = limits
    return (high - low) / 255 if for_cpu(precision, base) else max(-low, high) / LARGEST[precision]


# What stands in the file.


@each_file
def test_linear_layers_alone_are_quantized(kind, precision, base):
    proto, original = lowered(kind, precision, base), exported(kind)
    made, constants = makers(proto), arrays(proto)
    linear = nodes(proto, "Gemm") + nodes(proto, "MatMul")
    assert [node.name for node in linear] == [n.name for n in nodes(original, "Gemm") + nodes(original, "MatMul")]
    assert linear
    biases = set()
    readers = {node.op_type for node in proto.graph.node if any(_is_dequantized(made, name) for name in node.input)}
    assert readers == {node.op_type for node in linear}
    for node in linear:
        activation, weight = made[node.input[0]], made[node.input[1]]
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert made[activation.input[0]].op_type == "QuantizeLinear"
        assert list(made[activation.input[0]].input[1:]) == list(activation.input[1:])
        assert constants[activation.input[1]].shape == ()
        assert constants[weight.input[1]].shape == constants[weight.input[0]].shape[:1]  # one for each output
        assert [a.i for a in weight.attribute if a.name == "axis"] == [0]
        if len(node.input) == 2:
            assert node.name.split(".")[-1].split("/")[0] in ("q", "k", "v")  # LV-ViT's, alone, have no bias
        elif for_cpu(precision, base):
            bias = made[node.input[2]]
            assert bias.op_type == "DequantizeLinear"
            assert constants[bias.input[0]].dtype == np.int32
            biases.add(bias.name)
        else:
            assert node.input[2] in constants  # as it was
        assert not any(reader.op_type in QUANTIZERS for reader in proto.graph.node if node.output[0] in reader.input)
    distinct = biases | {made[node.input[i]].name for node in linear for i in (0, 1)}
    assert len(nodes(proto, "DequantizeLinear")) == len(distinct)  # q, k and v share one


def _is_dequantized(made: dict[str, onnx.NodeProto], name: str) -> bool:
    return name in made and made[name].op_type == "DequantizeLinear"


@each_file
def test_the_rest_of_the_file_is_as_it_was(kind, precision, base):
    proto, original = lowered(kind, precision, base), exported(kind)
    onnx.checker.check_model(onnx.inliner.inline_local_functions(proto), full_check=True)
    assert [node.attribute for node in reorganizations(proto)] == [n.attribute for n in reorganizations(original)]
    assert [node.output for node in reorganizations(proto)] == [node.output for node in reorganizations(original)]
    assert [onnx.printer.to_text(f) for f in proto.functions] == [onnx.printer.to_text(f) for f in original.functions]
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": OPSET, DOMAIN: 1}
    added = (*QUANTIZERS, "Cast")
    kept = sorted((n.name, n.op_type) for n in proto.graph.node if n.op_type not in added)
    assert kept == sorted((n.name, n.op_type) for n in original.graph.node if n.op_type not in added)
    ends = [info.type.tensor_type.elem_type for info in (*proto.graph.input, *proto.graph.output)]
    assert ends == [TensorProto.FLOAT, TensorProto.FLOAT]
    card, own = read_card(proto), read_card(original)
    assert own is not None
    assert card == msgspec.structs.replace(own, precision=precision)
    assert sum(node.op_type == NAME for node in proto.graph.node) == len(own.plan.locations)


@based
def test_what_is_not_quantized_is_in_the_base_precision(precision, base):
    constants = arrays(lowered("plain", precision, base))
    wanted = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[base]
    before = arrays(exported("plain"))
    shared = [name for name in constants if before.get(name, np.zeros(1)).dtype == np.float32 and name in before]
    assert {"norm.bias", "pos_embed", "patch_embed.proj.weight"} <= set(shared)
    assert ("head.bias" in shared) != for_cpu(precision, base)
    rows = {name for node in lowered("plain", precision).graph.node if node.op_type == "Mul" for name in node.input}
    for name in set(shared) - rows:  # the score row stays FP32
        assert constants[name].dtype == wanted, name
        assert constants[name].tobytes() == before[name].astype(wanted).tobytes()
    scales = [array for name, array in constants.items() if name.endswith("_scale")]
    assert {array.dtype for array in scales} == {np.dtype(wanted)}
    assert all((array > 0).all() for array in scales)


@each_fp32_file
def test_scales_of_activations_cover_every_calibration_image(kind, precision):
    proto = lowered(kind, precision)
    constants = arrays(proto)
    seen = {node.input[0]: float(constants[node.input[1]]) for node in nodes(proto, "QuantizeLinear")}
    limits = observed(kind, list(seen), calibration_of(kind))
    for name, scale in seen.items():
        assert scale == pytest.approx(scale_of(limits[name], precision), rel=1e-5), name


@pytest.mark.parametrize("count", [1, 8, 32, 40])
@pytest.mark.parametrize("place", [0, -1])
def test_an_outlier_counts_wherever_it_stands_among_the_calibration_images(count, place):
    # ONNX Runtime's CalibMaxIntermediateOutputs would forget all batches but the last few, and fail on a multiple of 32
    calibration = images(of_kind("plain"), count)
    calibration[place] *= 20
    proto = set_precision(exported("plain"), "int8", calibration=calibration)
    node = nodes(proto, "QuantizeLinear")[0]
    limits = observed("plain", [node.input[0]], calibration)[node.input[0]]
    assert float(arrays(proto)[node.input[1]]) == pytest.approx(scale_of(limits, "int8"), rel=1e-5)


@each_fp32_file
def test_weights_are_quantized_by_row_to_the_nearest(kind, precision):
    proto, before = lowered(kind, precision), arrays(exported(kind))
    constants = arrays(proto)
    found = 0
    for node in nodes(proto, "DequantizeLinear"):
        if node.input[0] not in constants or constants[node.input[0]].dtype == np.int32:
            continue
        weight = before[node.input[0].removesuffix("_quantized")]
        scale = constants[node.input[1]][:, None]
        np.testing.assert_allclose(scale[:, 0], np.abs(weight).max(1) / LARGEST[precision], rtol=1e-6)
        stored = constants[node.input[0]]
        if precision == "int8":
            assert stored.dtype == np.int8
            assert (np.abs(stored * scale - weight) <= scale * 0.5001).all()
        else:
            assert stored.dtype == ml_dtypes.float8_e4m3fn
            assert stored.tobytes() == (weight / scale).astype(ml_dtypes.float8_e4m3fn).tobytes()
        assert np.isfinite(stored.astype(np.float32)).all()
        found += 1
    assert found == len(nodes(proto, "Gemm"))


@based
def test_zero_points_are_zero_and_in_the_quantized_type(precision, base):
    proto = lowered("plain", precision, base)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    activations = {node.input[2] for node in nodes(proto, "QuantizeLinear")}
    for node in (*nodes(proto, "QuantizeLinear"), *nodes(proto, "DequantizeLinear")):
        zero = tensors[node.input[2]]
        if for_cpu(precision, base) and zero.name in activations:
            assert zero.data_type == TensorProto.UINT8
        elif tensors.get(node.input[0], zero).data_type == TensorProto.INT32:
            assert not numpy_helper.to_array(zero).any()  # a bias
        else:
            assert zero.data_type == KIND[precision]
            assert not numpy_helper.to_array(zero).astype(np.float32).any()


def test_zero_is_exact_on_a_cpu():
    """After Gelu most values are near zero, and the zero point is where the smallest one puts it."""
    proto = lowered("plain", "int8")
    constants = arrays(proto)
    seen = {node.input[0]: node for node in nodes(proto, "QuantizeLinear")}
    limits = observed("plain", list(seen), calibration_of("plain"))
    for name, node in seen.items():
        wanted = round(-limits[name][0] / float(constants[node.input[1]]))
        assert abs(int(constants[node.input[2]]) - wanted) <= 1, name


def test_biases_are_quantized_with_the_scales_of_what_they_are_added_to():
    proto, before = lowered("plain", "int8"), arrays(exported("plain"))
    constants, made = arrays(proto), makers(proto)
    for node in nodes(proto, "Gemm"):
        activation, weight, bias = (made[name] for name in node.input)
        scale = constants[activation.input[1]] * constants[weight.input[1]]
        np.testing.assert_allclose(constants[bias.input[1]], scale, rtol=1e-6)
        exact = before[bias.input[0].removesuffix("_quantized")]
        np.testing.assert_allclose(constants[bias.input[0]] * scale, exact, atol=0.51 * float(scale.max()))


@based
def test_the_same_images_give_the_same_bytes_and_the_original_is_left_alone(precision, base):
    original = copied(exported("plain"))
    before, level = original.SerializeToString(deterministic=True), logging.getLogger().level
    found = set_precision(original, precision, base=base, calibration=calibration_of("plain"))
    assert original.SerializeToString(deterministic=True) == before
    wanted = lowered("plain", precision, base).SerializeToString(deterministic=True)
    assert found.SerializeToString(deterministic=True) == wanted
    assert logging.getLogger().level == level


def test_the_quantizer_says_nothing(capfd):
    set_precision(exported("plain"), "int8", calibration=images(of_kind("plain"), 2))
    assert capfd.readouterr() == ("", "")


def test_scales_that_fp16_would_round_to_zero_do_not():
    """A scale of 0 would divide by zero: everything after it would be infinite or not a number."""
    proto, inputs = copied(exported("plain")), images(of_kind("plain"), 2)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e-7), tensor.name))
    found = set_precision(proto, "int8", base="fp16", calibration=inputs)
    scale = arrays(found)["head.weight_scale"]
    assert (scale == np.finfo(np.float16).smallest_subnormal).all()
    outputs = answers(found, inputs)
    assert np.isfinite(outputs[answer_in(outputs)]).all()


# What stays as it was.

KEEP_LAYERS = ("blocks.3.mlp.*", "blocks.0.attn.k", "head")
KEPT = ["blocks.0.attn.k", "blocks.3.mlp.fc1", "blocks.3.mlp.fc2", "head"]


def linear_nodes(proto: ModelProto) -> dict[str, onnx.NodeProto]:
    """By the names of their layers, each of which has one."""
    return {layer_of(node.name): node for node in (*nodes(proto, "Gemm"), *nodes(proto, "MatMul"))}


@based
def test_layers_that_are_kept_are_those_of_the_base_precision(precision, base):
    found = set_precision(
        exported("plain"), precision, base=base, calibration=calibration_of("plain"), keep=KEEP_LAYERS
    )
    all_quantized = lowered("plain", precision, base)
    plain = exported("plain") if base == "fp32" else set_precision(exported("plain"), base)
    onnx.checker.check_model(onnx.inliner.inline_local_functions(found), full_check=True)
    own, quantized, unquantized = (linear_nodes(proto) for proto in (found, all_quantized, plain))
    constants, before = arrays(found), arrays(plain)
    for name, node in own.items():
        assert list(node.input) == list((unquantized if name in KEPT else quantized)[name].input), name
        if name in KEPT:
            for constant in node.input[1:]:
                assert constants[constant].dtype == before[constant].dtype
                assert constants[constant].tobytes() == before[constant].tobytes()
    used = {name for node in found.graph.node for name in node.input} | {o.name for o in found.graph.output}
    assert set(constants) <= used
    assert all(set(node.output) & used for node in found.graph.node if node.op_type in QUANTIZERS)
    card, other = read_card(found), read_card(all_quantized)
    assert card is not None
    assert other is not None
    assert (list(card.unquantized), card.precision) == (KEPT, precision)
    assert other.unquantized == ()


@pytest.mark.parametrize("base", ["fp32", "fp16"])
def test_leaving_layers_out_afterwards_is_leaving_them_out(base):
    """The quantizer's own exclusion is the oracle, for layers that share their input with no other."""
    original, calibration = exported("plain"), calibration_of("plain")
    quantized = quantize(original, "int8", base, calibration)
    kept = layers_like(("blocks.3.mlp.*", "blocks.1.attn.proj", "head"), quantized.layers)
    excluded = [node.name for layer, node in linear_nodes(original).items() if layer in kept]
    found, wanted = quantized.without(kept), quantize(original, "int8", base, calibration, excluded).proto
    described = [
        sorted((n.op_type, n.name, *n.input, *n.output) for n in proto.graph.node) for proto in (found, wanted)
    ]
    assert described[0] == described[1]
    constants, others = arrays(found), arrays(wanted)
    assert {name: a.tobytes() for name, a in constants.items()} == {name: a.tobytes() for name, a in others.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_called_as_in_the_checkpoint(kind):
    quantized = quantize(exported(kind), "int8", "fp32", images(of_kind(kind), 2))
    parts = {"q", "k", "v"}  # of one matrix in the checkpoint
    named = {
        name.rpartition(".")[0] + ".qkv" if name.rpartition(".")[2] in parts else name for name in quantized.layers
    }
    assert {f"{name}.weight" for name in named} <= set(of_kind(kind).state_dict())
    assert len(quantized.layers) == len(linear_nodes(quantized.proto))
    assert quantized.share(quantized.layers) == 1
    head = of_kind("plain").head.weight.numel()
    if kind == "plain":
        linear = [p.numel() for n, p in of_kind(kind).named_parameters() if p.ndim == 2 and n.endswith("weight")]
        assert quantized.share(["head"]) == pytest.approx(head / sum(linear))


@pytest.mark.parametrize(
    ("patterns", "hints"),
    [
        (("head", "blocks.12.mlp.*"), ["--keep-precision", "'blocks.12.mlp.*'", "Did you mean 'blocks.2.mlp.*'?"]),
        (("blocks.3",), ["'blocks.3'", "Did you mean 'blocks.3.*'?"]),
        (("blocks.0.attn.qkv",), ["'blocks.0.attn.qkv'", "Did you mean 'blocks.0.attn."]),
        (("norm",), ["'norm'", "one of blocks.0.attn.q,"]),
        (("",), ["''"]),
        (("head", "blocks.*"), ["match every layer", "nothing would be quantized"]),
    ],
)
def test_patterns_that_name_no_layer_or_all(patterns, hints):
    with pytest.raises(InputError) as caught:
        set_precision(exported("plain"), "int8", calibration=calibration_of("plain"), keep=patterns)
    assert all(hint in str(caught.value) for hint in hints), str(caught.value)


# What it answers.

# Of the spread of the logits. INT8 rounds to 1/254 of the range, which is some 7 standard deviations: 0.8 % of one for
# each of the 17 roundings in a row of these models, whose squares add up to 3 %. FP8 has 3 bits of mantissa, so it
# rounds by up to 1/16, 3.6 % as a root mean square of both factors, shrunk by less than half in the sum: 6 to 10 %.
# Half as much again is left for machines that round elsewhere.
NOISE = {"int8": 0.05, "fp8": 0.15}


def noise_of(proto: ModelProto, kind: str, precision: str) -> float:
    inputs = images(of_kind(kind), 6)
    # nothing is asked of the dense twin, so that any file will do for it
    return make_golden(reduced(kind), of_kind(kind), inputs, precision, (proto, proto)).noise()


@pytest.mark.parametrize("base", ["fp32", "fp16"])
@each_fp32_file
def test_the_noise_is_that_of_the_rounding(kind, precision, base):
    assert NOISE[precision] / 5 < noise_of(lowered(kind, precision, base), kind, precision) < NOISE[precision]


@pytest.mark.parametrize(("precision", "factor"), [("int8", 0.25), ("int8", 8), ("fp8", 0.25)])
def test_ranges_that_the_images_do_not_have_are_worse(precision, factor):
    """Too narrow ones cut off, too wide ones are coarse (FP8 is as fine in any); brighter images change no range here,
    because LayerNorm comes before every quantized layer."""
    proto = copied(lowered("plain", precision))
    scales = {node.input[1] for node in nodes(proto, "QuantizeLinear")}
    for tensor in proto.graph.initializer:
        if tensor.name in scales:
            array = numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert noise_of(proto, "plain", precision) > 1.5 * noise_of(lowered("plain", precision), "plain", precision)


# What is refused.


@quantized
@pytest.mark.parametrize("calibration", [None, np.zeros((0, 3, 96, 96), np.float32)])
def test_without_images_nothing_can_be_quantized(precision, calibration):
    with pytest.raises(InputError, match=rf"{precision} needs real images.*--calibration"):
        set_precision(exported("plain"), precision, calibration=calibration)


@quantized
@pytest.mark.parametrize("base", ["int8", "fp64", ""])
def test_a_base_that_is_no_float(precision, base):
    with pytest.raises(InputError, match=r"stays unquantized.*fp32 or fp16 or bf16"):
        set_precision(exported("plain"), precision, base=base, calibration=calibration_of("plain"))


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_file_that_was_quantized_before(precision):
    with pytest.raises(InputError, match=r"exported in FP32.*int8"):
        set_precision(lowered("plain", "int8"), precision, calibration=calibration_of("plain"))


def test_images_that_the_model_does_not_take():
    with pytest.raises(StageError, match="quantizer failed"):
        set_precision(exported("plain"), "int8", calibration=np.zeros((2, 3, 64, 64), np.float32))
