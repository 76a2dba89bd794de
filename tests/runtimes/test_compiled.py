"""``torch.compile`` as a runtime, and the eager one in half precision: the same answers as PyTorch as it is."""

import os

import numpy as np
import pytest
import torch

from evit_deploy.errors import StageError
from evit_deploy.registry import RUNTIMES
from evit_deploy.runtimes.compiled import CompiledRunner
from evit_deploy.runtimes.eager import EagerRunner
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from tests.support.models import KEEP, images, of_kind

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
needs_compiler = pytest.mark.skipif(CompiledRunner.missing() is not None, reason=str(CompiledRunner.missing()))


def on(device: str, model):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return model.to(device)


def reduced(kind: str = "plain", spec: TokenSpec = KEEP, dtype: torch.dtype = torch.float32):
    return reduce_tokens_(of_kind(kind), spec).to(dtype)


def answers(runner_class, model, batches=(1, 2), **options):
    with runner_class(model, **options) as runner:
        return [runner.infer({"input": images(model, batch)}) for batch in batches]


def limit(dtype: torch.dtype, reference: np.ndarray) -> float:
    return 16 * torch.finfo(dtype).eps * float(np.abs(reference).max())


# ---- eager


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_computes_in_the_dtype_of_the_weights(dtype, device):
    (exact,) = answers(EagerRunner, reduced(dtype=torch.float64), (3,), with_indices=True)
    (answer,) = answers(EagerRunner, on(device, reduced(dtype=dtype)), (3,), with_indices=True)
    assert list(answer) == list(exact)
    assert answer["logits"].dtype == np.float32
    assert all(answer[name].dtype == np.int32 for name in answer if name != "logits")
    error = np.abs(answer["logits"] - exact["logits"]).max()
    assert error <= limit(dtype, exact["logits"])
    if dtype != torch.float32:  # it did not quietly compute in another
        assert error > limit(torch.float32, exact["logits"])


# ---- compiled


def test_it_is_found_by_its_name_and_run_only_when_asked_for():
    assert RUNTIMES.get("torch.compile") is CompiledRunner
    assert (CompiledRunner.name, CompiledRunner.files, CompiledRunner.default) == ("torch.compile", (), False)
    assert CompiledRunner.accepts(torch.nn.Linear(1, 1)) == EagerRunner.accepts(torch.nn.Linear(1, 1)) != []
    assert CompiledRunner.accepts("model.onnx") == ["it runs PyTorch models, not str"]


def test_no_compiler_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    missing = CompiledRunner.missing()
    assert missing is not None
    assert missing.exit_code == 3
    assert "C++ compiler" in str(missing)
    assert "CXX" in str(missing)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "no /nowhere/c++" in str(CompiledRunner.missing())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_answers_like_eager_and_keeps_the_same(dtype, device):
    """With ``fullgraph`` inside, this also says that a reduced model has no graph breaks."""
    batches = (1, 2) if dtype == torch.float32 else (2,)
    model = on(device, reduced("smallest", dtype=dtype))
    expected = answers(EagerRunner, model, batches, with_indices=True)
    with CompiledRunner(model, with_indices=True, threads=1) as told, CompiledRunner(model, threads=1) as plain:
        assert told.outputs == EagerRunner(model, with_indices=True).outputs
        for batch, eager in zip(batches, expected, strict=True):
            feeds = {"input": images(model, batch)}
            answer = told.infer(feeds)
            assert list(answer) == list(eager)
            assert np.abs(answer["logits"] - eager["logits"]).max() <= limit(dtype, eager["logits"])
            for row in token_plan(model).locations:
                kept = answer[f"kept_{row.block}"]
                assert (kept.dtype, kept.shape) == (np.int32, (batch, row.keep))
                if dtype == torch.float32:  # half precision rounds fused kernels otherwise, and near ties change places
                    np.testing.assert_array_equal(kept, eager[f"kept_{row.block}"])
            if dtype == torch.float32 and batch == 1:
                assert list(plain.infer(feeds)) == ["logits"]
            again = told.infer(feeds)  # nothing of the last call is left in it, nor overwritten by it
            np.testing.assert_array_equal(again["logits"], answer["logits"])
    assert not any(module._forward_hooks for module in model.modules())
    after = answers(EagerRunner, model, batches)
    np.testing.assert_array_equal(after[0]["logits"], expected[0]["logits"])


@needs_compiler
@pytest.mark.slow
def test_every_kind_of_model_is_one_graph():
    """Traced, not compiled: the kernels are PyTorch's business. Other methods, and without fusion, too."""
    drop = TokenSpec(keep_rate=(0.8, 0.5), locations=(0, 2), fuse=False)
    models = [reduced("distilled"), reduced("qk-norm, one channel", drop)]
    models += [reduced(spec=TokenSpec(method="slice", keep_rate=0.5)), dense_twin(models[0])]
    for model in models:
        torch.compiler.reset()
        explanation = torch._dynamo.explain(model)(torch.from_numpy(images(model, 2)))
        assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    torch.compiler.reset()


@needs_compiler
@pytest.mark.slow
def test_more_batch_sizes_than_pytorch_allows_by_itself(monkeypatch):
    """PyTorch gives up after eight programs; traced only, for the same reason as above."""
    model = reduce_tokens_(of_kind("smallest"), KEEP)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, mode, **kw: compile_(forward, backend="eager", **kw))
    for outputs in answers(CompiledRunner, model, range(1, 10), threads=1):
        assert np.isfinite(outputs["logits"]).all()
    torch.compiler.reset()


@needs_compiler
def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path):
    """A compiler that is there and does not work, as with a damaged installation."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho internal compiler error >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing that was compiled before
    torch.compiler.reset()
    model = reduce_tokens_(of_kind("smallest"), KEEP)
    threads = torch.get_num_threads()
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(broken))}),  # monkeypatch would not put it back
        pytest.raises(StageError, match=r"torch\.compile fails") as caught,
        CompiledRunner(model, threads=1) as runner,
    ):
        runner.infer({"input": images(model, 1)})
    assert "\n" not in str(caught.value)
    assert torch.get_num_threads() == threads
    torch.compiler.reset()
