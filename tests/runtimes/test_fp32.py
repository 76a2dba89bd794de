"""FP32 in full or in TF32: switches that hold for a call, and on a GPU what they do to the answers."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.runtimes.compiled import CompiledRunner
from evit_deploy.runtimes.eager import EagerRunner
from evit_deploy.runtimes.fp32 import fp32_products, missing_tf32
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.verification.verify import verify
from tests.support.models import KEEP, images, of_kind

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
has_tf32 = torch.cuda.is_available() and missing_tf32(torch.device("cuda")) is None
needs_tf32 = pytest.mark.skipif(not has_tf32, reason="no CUDA device that has TF32")
needs_compiler = pytest.mark.skipif(CompiledRunner.missing() is not None, reason=str(CompiledRunner.missing()))


def switches() -> tuple[str, ...]:
    """What PyTorch's parts go by."""
    backends = torch.backends
    places = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul
    return tuple(place.fp32_precision for place in places)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolution", [True, False])
def test_the_switches_hold_while_it_is_open_and_are_put_back(matmul, convolution):
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolution
    before = switches()
    for tf32 in (False, True, False):
        with fp32_products(tf32=tf32):
            assert torch.backends.cuda.matmul.allow_tf32 == tf32
            assert torch.backends.cudnn.allow_tf32 == tf32
            assert [name == "tf32" for name in switches()[:3]] == [tf32] * 3
        assert switches() == before
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 == convolution


def test_they_are_put_back_after_an_error():
    before = switches()
    with pytest.raises(ZeroDivisionError), fp32_products(tf32=True):
        raise ZeroDivisionError
    assert switches() == before


def test_a_caller_that_knows_the_new_names_alone_finds_them_as_it_left_them():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    before = switches()
    assert before[:2] == ("tf32", "ieee")
    with fp32_products(tf32=False):
        assert "tf32" not in switches()[:3]
    assert switches() == before


def test_a_call_takes_its_own_switches_and_leaves_those_of_the_process():
    seen = []
    torch.set_float32_matmul_precision("high")
    model = reduce_tokens_(of_kind("smallest"), KEEP)
    handle = model.patch_embed.register_forward_hook(lambda *_: seen.append(switches()[:3]))
    with EagerRunner(model) as runner:
        feeds = {"input": images(model, 1)}
        runner.infer(feeds)
        runner.resident(feeds).run()
    handle.remove()
    assert len(seen) == 2
    assert not any("tf32" in names for names in seen)
    assert torch.get_float32_matmul_precision() == "high"


@needs_compiler
@pytest.mark.slow
def test_switches_that_the_process_moves_do_not_compile_anew(monkeypatch):
    """Traced, not compiled: PyTorch guards programs by these switches, and each call has its own."""
    model, traced = reduce_tokens_(of_kind("smallest"), KEEP), []
    compile_ = torch.compile

    def backend(graph, inputs):
        traced.append(switches()[:3])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda forward, mode, **kw: compile_(forward, backend=backend, **kw))
    torch.compiler.reset()
    with CompiledRunner(model, threads=1) as runner:
        for matmul in ("highest", "high", "highest", "high"):
            torch.set_float32_matmul_precision(matmul)
            runner.infer({"input": images(model, 1)})
    torch.compiler.reset()
    assert len(traced) == 1
    assert "tf32" not in traced[0]


def test_tf32_is_refused_where_it_is_not():
    model = reduce_tokens_(of_kind("smallest"), KEEP)
    for name in ("eager", "torch.compile"):
        if name == "torch.compile" and CompiledRunner.missing() is not None:
            continue
        with (
            pytest.raises(MissingRequirement, match="tf32 is a precision of NVIDIA") as error,
            opened(name, model, tf32=True),
        ):
            pass
        assert error.value.exit_code == 3
        assert error.value.seen == "a model on the CPU"
    with pytest.raises(InputError, match="onnxruntime has no tf32"), opened("onnxruntime", model, tf32=True):
        pass


# ---- with a GPU


@pytest.fixture
def switched_on() -> None:
    """What PyTorch itself may be left at, so that FP32 is FP32 by our doing."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.gpu
@needs_tf32
@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize(
    "runtime", [EagerRunner, pytest.param(CompiledRunner, marks=[needs_compiler, pytest.mark.slow])]
)
def test_fp32_on_a_gpu_is_fp32_and_tf32_is_not(runtime):
    model = reduce_tokens_(of_kind("smallest"), KEEP)
    feeds = {"input": images(model, 4)}
    with EagerRunner(reduce_tokens_(of_kind("smallest"), KEEP).double()) as exact:
        reference = exact.infer(feeds)["logits"]
    model, errors = model.to("cuda"), {}
    with runtime(model) as full, runtime(model, tf32=True) as short:
        for _ in range(4):  # in turns; compiled ones record and replay meanwhile
            for name, runner in (("fp32", full), ("tf32", short)):
                logits = runner.infer(feeds)["logits"]
                errors.setdefault(name, []).append(np.abs(logits - reference).max())
                resident = runner.resident(feeds)
                resident.run()
                resident.round_trip()
                runner.synchronize()
                np.testing.assert_array_equal(resident.answers()["logits"], logits)
    scale = np.abs(reference).max()
    assert max(errors["fp32"]) <= 16 * np.finfo(np.float32).eps * scale
    assert min(errors["tf32"]) > 10 * max(errors["fp32"])
    assert max(errors["tf32"]) <= 0.05 * scale


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("switched_on")
def test_a_bundle_is_verified_by_pytorch_on_a_gpu(converted: Bundle):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = verify(converted.path, runtimes=["eager"])
    report.raise_if_failed()
    assert {check.name.split(",")[0] for check in report.checks} == {"files as written", "eager"}
    assert torch.cuda.max_memory_allocated() > before  # it was there that it ran
