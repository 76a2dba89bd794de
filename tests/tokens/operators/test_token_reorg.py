"""``evit::TokenReorg`` against the oracle: eager PyTorch and ONNX Runtime on the table of cases, then properties."""

import numpy as np
import onnx
import onnx.helper
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.errors import InputError
from evit_deploy.tokens.methods.evit import class_scores
from evit_deploy.tokens.operators.token_reorg import DOMAIN, DOMAIN_VERSION, NAME, onnx_function, select, token_reorg
from tests.support import oracle
from tests.support.cases import CASES, DTYPES, EPS, Case
from tests.support.op_checks import (
    TORCH,
    check_answer,
    check_choice,
    check_copies,
    each_case,
    each_dtype,
    error_of,
    largest,
    to_numpy,
    to_torch,
)

OPSET = 23
ONNX = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


def run_eager(case: Case, x: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, idx = token_reorg(to_torch(x), to_torch(scores), case.keep, case.fuse, case.prefix)
    return to_numpy(y), to_numpy(idx)


def test_cases_have_unique_ids():
    assert len({case.id for case in CASES}) == len(CASES)


@each_dtype
@each_case
def test_eager_matches_the_oracle(case, dtype):
    x, scores = case.inputs(dtype)
    y, idx = run_eager(case, x, scores)
    check_answer(case, dtype, x, scores, y, idx)


def onnx_model(case: Case, dtype: str, opset: int = OPSET) -> onnx.ModelProto:
    """A model of a single node, with the op's body in the file."""
    node = onnx.helper.make_node(
        NAME,
        ["x", "scores"],
        ["y", "idx"],
        domain=DOMAIN,
        keep=case.keep,
        fuse=int(case.fuse),
        prefix=case.prefix,
        plugin_version="1",
        plugin_namespace=DOMAIN,
    )
    shapes = {
        "x": (ONNX[dtype], ["batch", case.prefix + case.candidates, case.width]),
        "scores": (ONNX["fp32"], ["batch", case.candidates]),
        "y": (ONNX[dtype], ["batch", case.prefix + case.keep + case.fuse, case.width]),
        "idx": (onnx.TensorProto.INT32, ["batch", case.keep]),
    }
    values = {name: onnx.helper.make_tensor_value_info(name, *what) for name, what in shapes.items()}
    graph = onnx.helper.make_graph([node], "token_reorg", [values["x"], values["scores"]], [values["y"], values["idx"]])
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        functions=[onnx_function(opset)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model


def run_onnxruntime(case: Case, dtype: str, x: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            onnx_model(case, dtype).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        if dtype == "bf16":
            pytest.skip(f"ONNX Runtime's CPU provider has no BF16 kernel: {str(error).splitlines()[0]}")
        raise
    # Bound by address, because ONNX Runtime gives BF16 neither to nor from NumPy.
    y = np.empty((case.batch, case.prefix + case.keep + case.fuse, case.width), DTYPES[dtype])
    idx = np.empty((case.batch, case.keep), np.int32)
    binding = session.io_binding()
    for name, array, kind in (("x", x, ONNX[dtype]), ("scores", scores, ONNX["fp32"])):
        binding.bind_input(name, "cpu", 0, kind, array.shape, array.ctypes.data)
    for name, array, kind in (("y", y, ONNX[dtype]), ("idx", idx, onnx.TensorProto.INT32)):
        binding.bind_output(name, "cpu", 0, kind, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return y, idx


@each_dtype
@each_case
def test_onnxruntime_matches_the_oracle(case, dtype):
    x, scores = case.inputs(dtype)
    y, idx = run_onnxruntime(case, dtype, x, scores)
    kept = check_choice(case, idx)
    check_copies(case, x, y, kept)
    reference = oracle.reorganize(x, scores, kept, case.fuse, case.prefix)
    eager, eager_idx = run_eager(case, x, scores)
    eager_reference = oracle.reorganize(x, scores, eager_idx.astype(np.int64), case.fuse, case.prefix)
    limit = max(2 * error_of(eager, eager_reference), 4 * EPS[dtype] * largest(np.abs(reference)))
    assert error_of(y, reference) <= limit


@pytest.mark.parametrize("opset", [18, 23])
def test_the_body_is_one_function_for_all_attribute_values(opset):
    function = onnx_function(opset)
    assert (function.domain, function.name) == ("evit", "TokenReorg")
    assert list(function.attribute) == ["keep", "fuse", "prefix"]
    assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", opset)]
    assert [function.output[0], function.output[1]] == ["y", "idx"]
    assert function.node[-1].op_type == "Cast"  # what the contract says the body ends in
    assert function.node[-1].attribute[0].i == onnx.TensorProto.INT32


# ---- class scores


def random_qk(seed: int, batch: int, tokens: int, heads: int, width: int, spread: float = 1.0):
    random = np.random.default_rng(seed)
    return tuple((spread * random.standard_normal((batch, tokens, heads, width))).astype(np.float32) for _ in range(2))


@each_dtype
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width", "prefix", "spread"),
    [
        (2, 197, 6, 64, 1, 1.0),  # DeiT-S
        (1, 198, 3, 64, 2, 1.0),  # distilled DeiT-Ti
        (1, 581, 6, 64, 5, 1.0),  # DINOv2 with registers at 336
        (3, 5, 1, 4, 1, 1.0),
        (2, 9, 2, 3, 8, 1.0),  # one candidate
        (2, 50, 3, 32, 1, 6.0),  # a peaked softmax
        (1, 12, 2, 8, 0, 1.0),  # token 0 asks, and is itself a candidate
    ],
)
def test_class_scores_match_the_oracle(batch, tokens, heads, width, prefix, spread, dtype):
    q, k = (array.astype(DTYPES[dtype]) for array in random_qk(tokens, batch, tokens, heads, width, spread))
    scale = width**-0.5
    scores = class_scores(to_torch(q), to_torch(k), scale, prefix)
    reference = oracle.class_scores(q, k, scale, prefix)
    assert scores.dtype == torch.float32
    assert scores.shape == reference.shape
    # Half-precision q and k are read exactly and everything after is FP32: the same tolerance for all three.
    error = np.abs(scores.double().numpy() - reference) / reference.max(axis=1, keepdims=True)
    assert error.max() <= oracle.class_scores_error(q, k, scale)


def test_class_scores_leave_out_what_the_prefix_got():
    q, k = (torch.from_numpy(array) for array in random_qk(0, 2, 10, 3, 8))
    everything = class_scores(q, k, 0.5, 0)
    torch.testing.assert_close(everything.sum(1), torch.ones(2))
    for prefix in (1, 2, 5):
        scores = class_scores(q, k, 0.5, prefix)
        assert torch.equal(scores, everything[:, prefix:])  # dropped, not redistributed
        assert (scores.sum(1) < 1).all()


def test_class_scores_read_no_query_but_the_first():
    q, k = (torch.from_numpy(array) for array in random_qk(1, 2, 10, 3, 8))
    scores = class_scores(q, k, 0.5, 1)
    q[:, 1:] = torch.nan
    assert torch.equal(class_scores(q, k, 0.5, 1), scores)


def test_class_scores_have_the_right_gradient():
    q, k = random_qk(2, 1, 6, 2, 4)
    weights = np.random.default_rng(3).standard_normal((1, 5))
    tensors = [torch.from_numpy(array).requires_grad_() for array in (q, k)]
    (class_scores(*tensors, 0.5, 1) * torch.from_numpy(weights)).sum().backward()
    step = 1e-6  # central differences of the float64 oracle: wrong by about step², far below FP32
    for which, tensor in enumerate(tensors):
        direction = np.random.default_rng(4 + which).standard_normal(q.shape)
        moved = [[array.astype(np.float64) for array in (q, k)] for _ in range(2)]
        moved[0][which] += step * direction
        moved[1][which] -= step * direction
        ahead, behind = ((oracle.class_scores(*pair, 0.5, 1) * weights).sum() for pair in moved)
        slope = float((tensor.grad.double().numpy() * direction).sum())
        assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


# ---- properties


@st.composite
def calls(draw, always_fuse=False, distinct=False):
    """Arguments of a small call: x, scores, keep, fuse, prefix. Scores are multiples of 1/64, so ties are common."""
    batch, prefix, candidates, width = (draw(st.integers(*bounds)) for bounds in ((1, 3), (0, 5), (1, 24), (1, 6)))
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal((batch, prefix + candidates, width))
    row = st.lists(st.integers(0, 64), min_size=candidates, max_size=candidates, unique=distinct)
    scores = np.array(draw(st.lists(row, min_size=batch, max_size=batch)), np.float32) / 64
    keep = draw(st.integers(1, candidates))
    fuse = always_fuse or draw(st.booleans())
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(scores), keep, fuse, prefix


@given(calls(always_fuse=True))
def test_the_fused_row_is_the_weighted_sum_of_the_rest(call):
    x, scores, keep, _, prefix = call
    y, idx = token_reorg(*call)
    patches = x[:, prefix:].double()
    total = (scores.double().unsqueeze(-1) * patches).sum(1)
    kept = idx.long()
    taken = scores.gather(1, kept).double().unsqueeze(-1) * y[:, prefix : prefix + keep].double()
    torch.testing.assert_close(y[:, -1].double(), total - taken.sum(1), rtol=1e-5, atol=1e-5)


@given(calls())
def test_the_prefix_is_untouched_and_kept_rows_are_copies(call):
    x, _, keep, fuse, prefix = call
    y, idx = token_reorg(*call)
    assert y.shape == (len(x), prefix + keep + fuse, x.shape[2])
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    for image, rows, kept in zip(x, y, idx.long(), strict=True):
        assert torch.equal(rows[prefix : prefix + keep], image[prefix:][kept])


@given(calls())
def test_ties_keep_the_lowest_index_first(call):
    _, scores, keep, _, _ = call
    _, idx = token_reorg(*call)
    for row, kept in zip(scores.tolist(), idx.tolist(), strict=True):
        assert kept == sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep]


@given(calls(distinct=True), st.randoms(use_true_random=False))
def test_a_permutation_of_the_patches_changes_only_the_indices(call, random):
    x, scores, keep, fuse, prefix = call
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    order = torch.tensor(order)
    shuffled = torch.cat([x[:, :prefix], x[:, prefix:][:, order]], dim=1)
    y, idx = token_reorg(*call)
    y_shuffled, idx_shuffled = token_reorg(shuffled, scores[:, order], keep, fuse, prefix)
    assert torch.equal(order[idx_shuffled.long()].int(), idx)
    front = prefix + keep
    assert torch.equal(y_shuffled[:, :front], y[:, :front])
    torch.testing.assert_close(y_shuffled[:, front:], y[:, front:], rtol=1e-5, atol=1e-5)  # summed in another order


@given(calls())
def test_an_image_does_not_see_its_batch(call):
    x, scores, keep, fuse, prefix = call
    y, idx = token_reorg(*call)
    front = prefix + keep
    for i in range(len(x)):
        alone, alone_idx = token_reorg(x[i : i + 1], scores[i : i + 1], keep, fuse, prefix)
        assert torch.equal(alone_idx, idx[i : i + 1])
        assert torch.equal(alone[:, :front], y[i : i + 1, :front])
        # The sum may be blocked differently for another batch size, which moves its last bits.
        torch.testing.assert_close(alone[:, front:], y[i : i + 1, front:], rtol=1e-6, atol=1e-6)


@given(calls())
def test_keeping_everything_gives_a_zero_row(call):
    x, scores, _, fuse, prefix = call
    candidates = scores.shape[1]
    y, idx = token_reorg(x, scores, candidates, fuse, prefix)
    assert torch.equal(idx.sort(1).values, torch.arange(candidates, dtype=torch.int32).expand(len(x), -1))
    if fuse:
        assert torch.equal(y[:, -1], torch.zeros_like(y[:, -1]))
    else:
        assert torch.equal(y[:, prefix:].sort(1).values, x[:, prefix:].sort(1).values)


@given(calls())
def test_gradients_flow_to_the_tokens_and_through_the_fused_row_to_the_scores(call):
    # For a fixed choice the op is linear in x and in the scores, so its gradients are known in closed form.
    x, scores, keep, fuse, prefix = call
    x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
    y, idx = token_reorg(x, scores, keep, fuse, prefix)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (y * weights).sum().backward()
    wanted_x, wanted_scores = torch.zeros_like(x), torch.zeros_like(scores)
    wanted_x[:, :prefix] = weights[:, :prefix]
    for b, kept in enumerate(idx.tolist()):
        for i in range(scores.shape[1]):
            if i in kept:
                wanted_x[b, prefix + i] = weights[b, prefix + kept.index(i)]
            elif fuse:
                wanted_x[b, prefix + i] = scores[b, i].detach() * weights[b, -1]
                wanted_scores[b, i] = x[b, prefix + i].detach() @ weights[b, -1]
    torch.testing.assert_close(x.grad, wanted_x)
    if fuse:
        torch.testing.assert_close(scores.grad, wanted_scores)
    else:
        assert scores.grad is None  # without a fused row the scores only choose


@given(
    st.lists(st.sampled_from([0.0, -0.0, 0.25, 1.0, float("inf"), float("nan")]), min_size=1, max_size=20), st.data()
)
def test_any_scores_give_a_valid_choice(row, data):
    keep = data.draw(st.integers(1, len(row)))
    assert oracle.is_valid_choice(select(torch.tensor([row]), keep).numpy(), len(row))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_mixed_precision_does_not_reach_the_fused_sum(dtype):
    # Automatic mixed precision runs matrix products in half precision; the contract sums in FP32.
    case = Case(2, 1, 196, 32, 98, True)
    x, scores = (to_torch(array) for array in case.inputs("fp32"))
    y, idx = token_reorg(x, scores, case.keep, case.fuse, case.prefix)
    with torch.autocast("cpu", dtype=TORCH[dtype]):
        y_mixed, idx_mixed = token_reorg(x, scores, case.keep, case.fuse, case.prefix)
    assert y_mixed.dtype == y.dtype
    assert torch.equal(idx_mixed, idx)
    assert torch.equal(y_mixed, y)


# ---- refusals


@pytest.mark.parametrize("shape", [(2, 6), (2, 8), (2, 7, 1), (7,)])
def test_scores_of_another_length_are_refused(shape):
    with pytest.raises(InputError, match=r"scores do not fit the tokens \(got .*, expected \[batch, 7\]\)"):
        token_reorg(torch.zeros(2, 8, 4), torch.zeros(shape), 3, True, 1)


@pytest.mark.parametrize("keep", [0, -1, 8])
def test_a_keep_count_out_of_range_is_refused(keep):
    with pytest.raises(InputError, match=rf"cannot keep that many tokens \(got {keep}, expected 1 to 7\)"):
        token_reorg(torch.zeros(2, 8, 4), torch.zeros(2, 7), keep, True, 1)
