"""``torch.ops.evit.token_reorg``: in tests over the host library, whose code is the GPU's."""

import numpy as np
import pytest
import torch

from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.tokens.methods.evit import class_scores
from evit_deploy.tokens.operators import torch_ops
from evit_deploy.tokens.operators.library import ABI, KERNEL, Identity
from evit_deploy.tokens.operators.token_reorg import reorganize, select, token_reorg
from tests.support import oracle, plugin_builds
from tests.support.cases import CASES
from tests.support.logs import notices
from tests.support.op_checks import TORCH, check_answer, each_case, each_dtype, to_numpy, to_torch
from tests.support.operators import SHAPES, CountedKernel, queries_and_keys, reduced
from tests.support.plugin_files import library

pytestmark = pytest.mark.cpp
OP = torch.ops.evit.token_reorg.default


@pytest.fixture
def in_use():
    kernel = CountedKernel(plugin_builds.host_library())
    with torch_ops.using(kernel, "cpu"):
        yield kernel


@each_dtype
@each_case
def test_it_matches_the_oracle_and_has_the_kernel_s_bits(case, dtype, in_use):
    x, scores = case.inputs(dtype)
    call = to_torch(x), to_torch(scores), case.keep, case.fuse, case.prefix
    y, idx = token_reorg(*call)
    assert in_use.count == 1
    check_answer(case, dtype, x, scores, to_numpy(y), to_numpy(idx))
    wanted, wanted_idx = in_use(*call)
    assert torch.equal(idx, wanted_idx)
    bits = {4: torch.int32, 2: torch.int16}[y.element_size()]
    assert torch.equal(y.view(bits), wanted.view(bits))


SMALL = [case for case in CASES if case.candidates in (7, 45) and case.scores == "random"]


@pytest.mark.parametrize("dtype", TORCH.values(), ids=str)
def test_it_keeps_the_rules_of_an_operator(dtype, in_use):
    """Schema, fake implementation, autograd registration, and the same answers under AOTAutograd."""
    for case in SMALL[::7]:
        x, scores = (to_torch(array) for array in case.inputs("fp32"))
        call = x.to(dtype).requires_grad_(), scores.requires_grad_(), case.keep, case.fuse, case.prefix
        torch.library.opcheck(OP, call)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_gradients_are_those_of_the_operations_in_pytorch(case, in_use):
    def gradients(function):
        x, scores = (to_torch(array).requires_grad_() for array in case.inputs("fp32"))
        y = function(x, scores)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad((y * weights).sum(), (x, scores), allow_unused=True)

    ours = gradients(lambda x, scores: token_reorg(x, scores, case.keep, case.fuse, case.prefix)[0])
    wanted = gradients(lambda x, s: reorganize(x, s, select(s, case.keep), case.fuse, case.prefix))
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-6, atol=1e-7)
    if case.fuse:
        torch.testing.assert_close(ours[1], wanted[1], rtol=1e-5, atol=1e-6)
    else:
        assert ours[1] is None


# ---- the score row


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_score_row_matches_the_oracle_by_teams_of_any_size(shape, dtype, in_use):
    *sizes, prefix, spread = shape
    q, k = queries_and_keys(*sizes, spread, dtype)
    scale = sizes[3] ** -0.5
    scores, probabilities = in_use.class_scores(q, k, scale, prefix)
    arrays = [to_numpy(tensor.contiguous()) for tensor in (q, k)]
    reference = oracle.class_scores(*arrays, scale, prefix)
    error = np.abs(scores.double().numpy() - reference) / reference.max(axis=1, keepdims=True)
    assert error.max() <= oracle.class_scores_error(*arrays, scale)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(sizes[0], sizes[2]))
    assert torch.equal(class_scores(q, k, scale, prefix), scores)
    one = q[:1], k[:1]
    for other in (in_use.class_scores(q, k, scale, prefix, threads=5), in_use.class_scores(*one, scale, prefix)):
        assert torch.equal(other[0], scores[: len(other[0])])
        assert torch.equal(other[1], probabilities[: len(other[1])])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_score_row_keeps_the_rules_of_an_operator(dtype, in_use):
    for length in (1, 12):
        q, k = (t.detach().requires_grad_() for t in queries_and_keys(2, 12, 3, 16, 1.0, dtype))
        torch.library.opcheck(torch.ops.evit.class_scores.default, (q[:, :length], k, 0.25, 1))


def test_the_score_row_has_the_gradients_of_the_operations_in_pytorch(in_use):
    weights = torch.randn(2, 11, generator=torch.Generator().manual_seed(0))

    def gradients():
        q, k = (t.detach().requires_grad_() for t in queries_and_keys(2, 12, 3, 16, 1.0, "fp32"))
        return torch.autograd.grad((class_scores(q, k, 0.25, 1) * weights).sum(), (q, k))

    ours = gradients()
    with torch_ops.using(None, "cpu"):
        wanted = gradients()
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_keys_at_an_address_off_the_grid_are_copied_first(in_use):
    q, k = queries_and_keys(1, 6, 2, 16, 1.0, "fp16")
    room = torch.zeros(k.numel() + 1, dtype=k.dtype)
    off = room[1:].view(k.shape).copy_(k)
    assert torch.equal(class_scores(q, off, 0.3, 1), class_scores(q, k, 0.3, 1))


def test_queries_and_keys_off_the_grid_are_left_to_pytorch(in_use):
    q, k = queries_and_keys(1, 6, 2, 12, 1.0, "fp16")  # 24 bytes a head
    assert not torch_ops.takes_scores(q, k)
    assert class_scores(q, k, 0.3, 1).shape == (1, 5)
    wide = torch.rand(1, 6, 2, 16).transpose(2, 3)
    assert not torch_ops.takes_scores(wide, wide)
    with pytest.raises(InputError, match="off the grid of 16 bytes"):
        in_use.class_scores(q, k, 0.3, 1)
    with pytest.raises(InputError, match="not contiguous"):
        in_use.class_scores(wide, wide, 0.3, 1)
    with pytest.raises(InputError, match="prefix is 6, expected 0 to 5"):
        in_use.class_scores(*queries_and_keys(1, 6, 2, 16, 1.0, "fp16"), 0.3, 6)


# ---- models


def test_a_model_takes_it_in_eager_mode_and_under_autocast(in_use):
    model, images = reduced(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        ours = model(images)
        assert in_use.count == 3
        with torch_ops.using(None, "cpu"):
            wanted = model(images)
        assert in_use.count == 3
        with torch.autocast("cpu", torch.bfloat16):
            low = model(images)
    assert in_use.count == 6
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), wanted, rtol=0.1, atol=0.1)


def test_under_autocast_x_keeps_its_type_and_the_sum_is_fp32(in_use):
    x = torch.tensor([[[0.0], [40000.0], [40000.0], [-40000.0], [-39999.0]]])
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = token_reorg(x, scores, 1, True, 1)
    assert y.dtype == torch.float32
    assert y[0, -1].item() == 40000 - 40000 - 39999


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_with_it_in_inference_and_training(in_use):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, images = reduced(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    with torch.inference_mode():
        assert torch.equal(compiled(images), model(images))
    (graph,) = graphs
    found = [node for node in graph.graph.nodes if "evit.token_reorg" in str(node.target)]
    assert len(found) == 3

    torch.compiler.reset()
    inductor = torch.compile(model, fullgraph=True, dynamic=False)
    before = in_use.count
    with torch.inference_mode():
        ours = inductor(images)
        assert in_use.count == before + 3
        wanted = model(images)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    gradients = []
    for run in (inductor, model):
        model.zero_grad()
        run(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


def test_what_the_kernel_does_not_take_pytorch_computes(in_use):
    for x, scores, prefix in (
        (torch.rand(1, 5, 4, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64), 1),
        (torch.rand(1, 13, 4), torch.rand(1, 4), 9),
        (torch.rand(1, 4098, 1), torch.rand(1, 4097), 1),
    ):
        y, _ = token_reorg(x, scores, 2, True, prefix)
        assert in_use.count == 0
        assert y.shape == (1, prefix + 3, x.shape[2])


def test_an_export_keeps_the_operations_of_pytorch(in_use):
    exported = torch.export.export(reduced(), (torch.randn(2, 3, 64, 64),))
    assert not [node for node in exported.graph.nodes if "evit" in str(node.target)]


def test_rows_that_do_not_follow_one_another_are_copied_first(in_use):
    x, scores = torch.rand(4, 2, 10).transpose(0, 1), torch.rand(4, 3)[:2].flip(1)
    y, idx = token_reorg(x[:, :, ::2], scores, 2, True, 1)
    wanted, wanted_idx = in_use(x[:, :, ::2].contiguous(), scores.contiguous(), 2, True, 1)
    assert torch.equal(y, wanted)
    assert torch.equal(idx, wanted_idx)


def test_without_a_kernel_the_operator_says_so():
    with pytest.raises(MissingRequirement, match=r"no kernel is in use on cpu.*evit-deploy plugin build"):
        torch.ops.evit.token_reorg(torch.rand(1, 5, 4), torch.rand(1, 4), 2, True, 1)


# ---- which library is taken


def test_a_gpu_without_a_number_is_the_current_one(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    numbered = torch.device("cuda", 3)
    with torch_ops.using(None, "cuda"):
        assert torch_ops._IN_USE[numbered] is None
    assert numbered not in torch_ops._IN_USE


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("80-real", "90-real"), (9, 0), True),
        (("80-real",), (8, 6), True),
        (("86-real",), (8, 0), False),
        (("80-real",), (9, 0), False),
        (("80-real",), (8, 7), False),
        (("87-real",), (8, 9), False),
        (("87-real",), (8, 7), True),
        (("80-real", "120"), (12, 1), True),
        (("80",), (9, 0), True),
        (("100-real",), (11, 0), False),
        ((), (9, 0), False),
    ],
)
def test_a_library_is_for_some_gpus(architectures, capability, runs):
    assert torch_ops.runs_on(Identity("kernel", "0.1.0", 2, architectures, None), capability) == runs


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as PyTorch would describe it; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return torch.device("cuda", 0)


def test_a_library_for_another_gpu_is_refused_when_named_and_passed_over_in_the_cache(gpu, monkeypatch, tmp_path):
    folder = tmp_path / "evit-deploy" / "plugins" / "0.1.0"
    folder.mkdir(parents=True)
    other = library(folder / KERNEL, "kernel", abi=ABI, architectures="80-real")
    assert torch_ops._find(gpu) is None
    library(folder.with_name("0.2.0") / KERNEL, "kernel", architectures="90-real")  # says so, and cannot be loaded
    (folder.with_name("0.3.0")).mkdir()
    (folder.with_name("0.3.0") / KERNEL).write_bytes(b"")
    told = notices()
    assert torch_ops._find(gpu) is None
    assert [line.partition(":")[0] for line in told] == ["ignoring a kernel in the cache"] * 2
    monkeypatch.setenv(torch_ops.ENVIRONMENT, "none")
    assert torch_ops._find(gpu) is None
    monkeypatch.setenv(torch_ops.ENVIRONMENT, str(other))
    with pytest.raises(MissingRequirement, match=r"EVIT_DEPLOY_KERNEL=.*not built for this GPU \(got 80-real"):
        torch_ops._find(gpu)
    monkeypatch.setenv(torch_ops.ENVIRONMENT, str(tmp_path / "none.so"))
    with pytest.raises(InputError, match="the library cannot be read"):
        torch_ops._find(gpu)
