"""``torch.ops.evit`` on a GPU: the compiled kernels under eager models, compiled ones and in training."""

import numpy as np
import pytest
import torch

from evit_deploy.tokens.operators import torch_ops
from evit_deploy.tokens.operators.kernel import TokenReorgKernel
from tests.support import oracle, plugin_builds
from tests.support.op_checks import TORCH, each_dtype, to_numpy
from tests.support.operators import SHAPES, CountedKernel, queries_and_keys, reduced

OP = torch.ops.evit.token_reorg.default
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TORCH.values(), ids=str)
def test_on_a_gpu_it_keeps_the_rules_of_an_operator(dtype):
    with torch_ops.using(TokenReorgKernel(plugin_builds.gpu_library()), "cuda:0"):
        x = torch.randn(2, 46, 16, device="cuda:0", dtype=dtype, requires_grad=True)
        scores = torch.rand(2, 45, device="cuda:0", requires_grad=True)
        torch.library.opcheck(OP, (x, scores, 30, True, 1))


@pytest.mark.gpu
@needs_gpu
@each_dtype
def test_on_a_gpu_the_score_row_matches_the_oracle(dtype):
    kernel = TokenReorgKernel(plugin_builds.gpu_library())
    for *sizes, prefix, spread in SHAPES:
        q, k = queries_and_keys(*sizes, spread, dtype)
        scale = sizes[3] ** -0.5
        qkv = torch.stack([q, k, k], 2).cuda()
        scores, _ = kernel.class_scores(qkv[:, :, 0], qkv[:, :, 1], scale, prefix)
        arrays = [to_numpy(tensor.contiguous()) for tensor in (q, k)]
        reference = oracle.class_scores(*arrays, scale, prefix)
        error = np.abs(scores.cpu().double().numpy() - reference) / reference.max(axis=1, keepdims=True)
        assert error.max() <= oracle.class_scores_error(*arrays, scale)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_eager_compiled_and_trained_models_take_it():
    kernel = CountedKernel(plugin_builds.gpu_library())
    with torch_ops.using(kernel, "cuda:0"):
        model, images = reduced().cuda(), torch.randn(2, 3, 64, 64, device="cuda:0")
        with torch.inference_mode():
            ours = model(images)
        assert kernel.count == 3
        with torch.inference_mode(), torch_ops.using(None, "cuda:0"):
            wanted = model(images)
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
        compiled = torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead")
        with torch.inference_mode():
            for _ in range(3):
                answer = compiled(images).clone()
        torch.testing.assert_close(answer, ours, rtol=1e-3, atol=1e-3)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.compile(model, fullgraph=True, dynamic=False)(images).float().square().sum()
        loss.backward()
        assert all(np.isfinite(p.grad.float().cpu().numpy()).all() for p in model.parameters() if p.grad is not None)
    torch.compiler.reset()
