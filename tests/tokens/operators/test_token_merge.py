"""``evit::TokenMerge`` against sums written out in float64: eager PyTorch and ONNX Runtime, and properties."""

import numpy as np
import onnx
import onnx.helper
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.errors import InputError
from evit_deploy.tokens.operators.token_merge import NAME, onnx_function, token_merge
from evit_deploy.tokens.operators.token_reorg import DOMAIN, DOMAIN_VERSION

OPSET = 23
TYPES = {"fp32": (onnx.TensorProto.FLOAT, np.float32), "fp16": (onnx.TensorProto.FLOAT16, np.float16)}


def problem(seed: int, batch: int, candidates: int, keep: int, prefix: int):
    """Tokens, sizes and a choice, the same every time."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, prefix + candidates, 5)).astype(np.float32)
    sizes = rng.integers(1, 9, size=(batch, candidates)).astype(np.float32)
    order = np.stack([rng.permutation(candidates) for _ in range(batch)])
    targets = rng.integers(0, keep, size=(batch, candidates - keep))
    return x, sizes, np.concatenate([order, targets], axis=1).astype(np.int32)


def merged(x: np.ndarray, sizes: np.ndarray, choice: np.ndarray, keep: int, prefix: int):
    """The definition, token by token."""
    x, sizes = x.astype(np.float64), sizes.astype(np.float64)
    batch, candidates = sizes.shape
    y = np.zeros((batch, prefix + keep, x.shape[2]))
    size = np.zeros((batch, keep))
    y[:, :prefix] = x[:, :prefix]
    for image in range(batch):
        stay, move, targets = np.split(choice[image], [keep, candidates])
        for place, own in enumerate(stay):
            group = [own, *(move[i] for i in range(len(move)) if targets[i] == place)]
            size[image, place] = sum(sizes[image, member] for member in group)
            total = sum(sizes[image, member] * x[image, prefix + member] for member in group)
            y[image, prefix + place] = total / size[image, place]
    return y, size


def eager(x, sizes, choice, keep, prefix, dtype=torch.float32):
    tokens = torch.from_numpy(x).to(dtype)
    y, size = token_merge(tokens, torch.from_numpy(sizes), torch.from_numpy(choice), (), keep, prefix)
    assert y.dtype == dtype
    assert size.dtype == torch.float32
    return y.float().numpy(), size.numpy()


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 12), st.data())
def test_tokens_are_means_weighted_by_size(seed, batch, candidates, data):
    keep, prefix = data.draw(st.integers(1, candidates)), data.draw(st.integers(0, 2))
    x, sizes, choice = problem(seed, batch, candidates, keep, prefix)
    y, size = eager(x, sizes, choice, keep, prefix)
    wanted, wanted_size = merged(x, sizes, choice, keep, prefix)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(size, wanted_size)
    np.testing.assert_array_equal(size.sum(axis=1), sizes.sum(axis=1))  # nothing is lost


def test_half_precision_holds_sums_that_it_could_not():
    x, sizes, choice = problem(0, 2, 9, 4, 1)
    x, sizes = 300 * x, 100 * sizes  # a sum of sizes times tokens would be infinite in FP16
    y, _ = eager(x, sizes, choice, 4, 1, torch.float16)
    wanted, _ = merged(x.astype(np.float16), sizes, choice, 4, 1)
    assert np.isfinite(y).all()
    assert np.abs(y - wanted).max() <= 4 * np.finfo(np.float16).eps * np.abs(x).max()


def test_gradients_reach_every_token_and_size():
    x, sizes, choice = problem(1, 2, 7, 3, 1)
    tokens = torch.from_numpy(x).double().requires_grad_()
    amounts = torch.from_numpy(sizes).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: token_merge(a, b, torch.from_numpy(choice), (), 3, 1), (tokens, amounts)
    )


def model(kind: str, candidates: int, keep: int, prefix: int, evidence: int) -> onnx.ModelProto:
    element = TYPES[kind][0]
    extra = [f"evidence_{i}" for i in range(evidence)]
    node = onnx.helper.make_node(
        NAME, ["x", "sizes", "choice", *extra], ["y", "size"], domain=DOMAIN, keep=keep, candidates=candidates,
        prefix=prefix,
    )  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    inputs = [
        info("x", element, ["batch", prefix + candidates, 5]),
        info("sizes", onnx.TensorProto.FLOAT, ["batch", candidates]),
        info("choice", onnx.TensorProto.INT32, ["batch", 2 * candidates - keep]),
        *(info(name, onnx.TensorProto.FLOAT, ["batch", 2]) for name in extra),
    ]
    outputs = [
        info("y", element, ["batch", prefix + keep, 5]), info("size", onnx.TensorProto.FLOAT, ["batch", keep])
    ]  # fmt: skip
    graph = onnx.helper.make_graph([node], "token_merge", inputs, outputs)
    made = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        functions=[onnx_function(OPSET, evidence)],
        ir_version=10,
    )
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("evidence", [0, 2])
@pytest.mark.parametrize(("candidates", "keep", "prefix"), [(12, 9, 1), (12, 12, 0), (7, 1, 2)])
def test_the_onnx_body_is_the_same_op(kind, evidence, candidates, keep, prefix):
    proto = model(kind, candidates, keep, prefix, evidence)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x, sizes, choice = problem(batch, batch, candidates, keep, prefix)
        x = x.astype(TYPES[kind][1])
        feeds = {"x": x, "sizes": sizes, "choice": choice}
        feeds |= {f"evidence_{i}": np.zeros((batch, 2), np.float32) for i in range(evidence)}
        y, size = session.run(None, feeds)
        wanted, wanted_size = merged(x, sizes, choice, keep, prefix)
        eps = np.finfo(TYPES[kind][1]).eps
        assert np.abs(y - wanted).max() <= 4 * eps * np.abs(x).max()
        np.testing.assert_allclose(size, wanted_size, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (2, 6)}, "sizes do not fit the tokens"),
        ({"choice": (2, 10)}, "the choice does not fit"),
        ({"keep": 0}, "the choice does not fit"),
        ({"keep": 8}, "the choice does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = {"sizes": (2, 7), "choice": (2, 11)} | change
    keep = shapes.pop("keep", 3)
    with pytest.raises(InputError, match=message):
        token_merge(
            torch.zeros(2, 8, 5), torch.ones(shapes["sizes"]), torch.zeros(shapes["choice"], dtype=torch.int32), (),
            keep, 1,
        )  # fmt: skip
