"""Plans for tests: tiny models with the exporter's node names, built by TensorRT-RTX, which needs no GPU for that."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

WIDTH, TOKENS = 64, 16  # one head of 64: the smallest supported by a fused kernel


def tiny_blocks(depth: int, dtype: Any = np.float16) -> ModelProto:
    """Blocks of q, k, v, a 3-D ``Attention``, a projection and a residual, named as the exporter names them."""
    generator = np.random.default_rng(0)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, weights, x = [], [], "input"
    for block in range(depth):
        name = f"blocks.{block}"
        for part in ("q", "k", "v", "proj"):
            drawn = generator.standard_normal((WIDTH, WIDTH)) / 8
            weights.append(numpy_helper.from_array(drawn.astype(dtype), f"{name}.attn.{part}.weight"))
        for part in ("q", "k", "v"):
            inputs = [x, f"{name}.attn.{part}.weight"]
            nodes.append(helper.make_node("MatMul", inputs, [f"{name}.{part}"], f"{name}.attn.{part}/MatMul"))
        heads = [f"{name}.{part}" for part in ("q", "k", "v")]
        attend = helper.make_node("Attention", heads, [f"{name}.mixed"], f"{name}.attn/Attention")
        attend.attribute.extend([helper.make_attribute("q_num_heads", 1), helper.make_attribute("kv_num_heads", 1)])
        inputs = [f"{name}.mixed", f"{name}.attn.proj.weight"]
        project = helper.make_node("MatMul", inputs, [f"{name}.out"], f"{name}.attn.proj/MatMul")
        output = "logits" if block == depth - 1 else f"{name}.tokens"
        nodes += [attend, project, helper.make_node("Add", [x, f"{name}.out"], [output], f"{name}/Add")]
        x = output
    shape = ["batch", TOKENS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", element, shape)],
        [helper.make_tensor_value_info("logits", element, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model)
    assert element in (TensorProto.FLOAT16, TensorProto.FLOAT)
    return model


def rtx_plan(model: ModelProto, gpus: Sequence[str] = ("SM80",), *, decomposable: bool = False) -> bytes:
    """Builds a plan for one or more GPUs; batches of 1 to 8.

    Args:
        model: The model to build.
        gpus: Members of ``ComputeCapability``.
        decomposable: Whether attention may be decomposed.
    """
    trt: Any = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(model.SerializeToString())
    for index in range(network.num_layers if decomposable else 0):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(gpus)
    for index, gpu in enumerate(gpus):
        config.set_compute_capability(getattr(trt.ComputeCapability, gpu), index)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *((batch, TOKENS, WIDTH) for batch in (1, 4, 8)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return bytes(plan)
