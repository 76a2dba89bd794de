"""The CUDA kernel: its own code on the CPU against the oracle, under sanitizers and in every cut; on a GPU the same."""

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.tokens.operators.kernel import Cut, TokenReorgKernel, _Call
from evit_deploy.tokens.operators.library import ABI, read_identity
from evit_deploy.tokens.operators.token_reorg import token_reorg
from tests.support import plugin_builds
from tests.support.case_program import CUTS, ProgramCall, answered, sent
from tests.support.cases import CASES, Case
from tests.support.op_checks import TORCH, check_answer, each_case, each_dtype, to_numpy, to_torch
from tests.support.paths import ROOT

SANITIZERS = {"address,undefined": 1, "thread": 3}  # and by how many threads: races take several
THREADED = tuple(msgspec.structs.replace(cut, threads=1 + i % 5) for i, cut in enumerate(CUTS))


@cache
def kernel() -> TokenReorgKernel:
    return TokenReorgKernel(plugin_builds.host_library())


def call_of(case: Case, dtype: str) -> tuple[torch.Tensor, torch.Tensor, int, bool, int]:
    x, scores = (to_torch(array) for array in case.inputs(dtype))
    return x, scores, case.keep, case.fuse, case.prefix


def assert_same_bits(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().view({4: torch.int32, 2: torch.int16}[tensor.element_size()]).numpy()


# ---- on the CPU


@pytest.mark.cpp
@each_dtype
@each_case
def test_the_host_build_matches_the_oracle(case, dtype):
    x, scores = case.inputs(dtype)
    y, idx = kernel()(*call_of(case, dtype))
    check_answer(case, dtype, x, scores, to_numpy(y), to_numpy(idx))


def answers_of(program: Path, calls: list[ProgramCall], *runner: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """What ``token_reorg_cases`` says to calls: y and idx of each."""
    done = subprocess.run([*runner, str(program)], input=sent(calls), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return list(answered(calls, done.stdout))


@pytest.mark.slow
@pytest.mark.cpp
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_whole_table_under_sanitizers_in_other_cuts(sanitizer):
    plugin_builds.need("cmake", "g++", "setarch")
    arguments = "-DEVIT_CUDA=OFF", f"-DEVIT_SANITIZE={sanitizer}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"
    program = plugin_builds.build(*arguments, targets=("token_reorg_cases",)) / "token_reorg_cases"
    threads = SANITIZERS[sanitizer]
    # Off the grid of 16 bytes on every third call. Large cases take minutes when every access is watched for races.
    cases = [case for case in CASES if threads == 1 or case.candidates * case.width <= 196 * 24]
    calls = [
        ProgramCall(case, dtype, int(i % 3 == 2), msgspec.structs.replace(CUTS[i % len(CUTS)], threads=threads))
        for i, (case, dtype) in enumerate((case, dtype) for case in cases for dtype in TORCH)
    ]
    found = answers_of(program, calls, "setarch", "-R")  # ThreadSanitizer wants its addresses where they always were
    for call, (y, idx) in zip(calls, found, strict=True):
        assert_same_bits((to_torch(y.copy()), to_torch(idx.copy())), kernel()(*call_of(call.case, call.dtype)))


@pytest.mark.cpp
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_sanitizers_would_find_something(sanitizer, tmp_path):
    plugin_builds.need("g++", "setarch")
    source = tmp_path / "wrong.cpp"
    source.write_text(
        "#include <thread>\n#include <vector>\nint sum;\nint main(int n, char**) {\n"
        "  std::vector<int> v(1);\n  std::thread other([] { ++sum; });\n  ++sum;\n  other.join();\n"
        "  return v.data()[n] > 5;\n}\n"
    )
    compile_ = ["g++", "-g", f"-fsanitize={sanitizer}", "-pthread", str(source), "-o", str(tmp_path / "wrong")]
    subprocess.run(compile_, check=True)
    done = subprocess.run(["setarch", "-R", str(tmp_path / "wrong")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Sanitizer" in done.stderr


@st.composite
def calls(draw):
    """Any call: sizes around the edges of accesses, lanes, runs and row groups; scores with many ties."""
    batch, prefix = draw(st.integers(1, 3)), draw(st.integers(0, 8))
    candidates = draw(st.one_of(st.integers(1, 40), st.integers(250, 270), st.integers(505, 530)))
    width = draw(st.sampled_from([1, 3, 4, 8, 12, 16, 40, 64, 136]))
    dtype = draw(st.sampled_from(list(TORCH.values())))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = torch.from_numpy(random.standard_normal((batch, prefix + candidates, width)).astype(np.float32)).to(dtype)
    scores = torch.from_numpy(random.integers(0, draw(st.integers(1, 1000)), (batch, candidates)) / 512).float()
    return x, scores, draw(st.integers(1, candidates)), draw(st.booleans()), prefix


@pytest.mark.cpp
@given(calls(), st.sampled_from(THREADED))
def test_any_call_in_any_cut_gives_the_same_bits(call, cut):
    y, idx = kernel()(*call)
    assert_same_bits((y, idx), kernel()(*call, cut=cut))
    eager, eager_idx = token_reorg(*call)
    assert torch.equal(idx, eager_idx)
    x, scores, keep, fuse, prefix = call
    front = prefix + keep
    assert torch.equal(y[:, :front], eager[:, :front])
    if fuse:
        rounding = torch.finfo(x.dtype).eps * eager[:, front:].abs().float()
        summing = 1e-6 * (scores.unsqueeze(-1) * x[:, prefix:].float().abs()).sum(1, keepdim=True)
        assert bool(((y[:, front:].float() - eager[:, front:].float()).abs() <= rounding + summing).all())


@pytest.mark.cpp
@given(calls())
def test_an_image_has_the_same_bits_in_any_batch(call):
    x, scores, *rest = call
    together = kernel()(*call)
    for i in range(len(x)):
        alone = kernel()(x[i : i + 1], scores[i : i + 1], *rest)
        assert_same_bits(alone, tuple(part[i : i + 1] for part in together))


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_goes_through_the_sum_unchanged(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = torch.stack([torch.zeros_like(numbers), numbers])[None]  # the second row is all of the sum
    y, _ = kernel()(x, torch.tensor([[2.0, 1.0]]), 1, True, 0)
    torch.testing.assert_close(y[0, 1], numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_round_to_the_nearest_even(dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 17, (2, 200_000), generator=generator)
    numbers = torch.ldexp(1 + torch.rand(2, 200_000, generator=generator), exponents).to(dtype)
    rows = torch.cat([torch.zeros(1, 200_000, dtype=dtype), numbers])[None]
    y, _ = kernel()(rows, torch.tensor([[2.0, 1.0, 1.0]]), 1, True, 0)
    wanted = (numbers[0].float() + numbers[1].float()).to(dtype)
    assert torch.equal(y[0, 1], wanted)
    assert bool(torch.isinf(wanted).any()) == (dtype == torch.float16)  # overflow is among them


@pytest.mark.cpp
@pytest.mark.parametrize("candidates", [6, 600], ids=["counting", "sorting"])
def test_unusual_scores(candidates):
    scores = torch.full((1, candidates), -1.0)
    scores[0, :6] = torch.tensor([0.0, -0.0, float("inf"), 0.0, -float("inf"), -0.0])
    _, idx = kernel()(torch.zeros(1, candidates, 8), scores, candidates, True, 0)
    assert idx[0, :5].tolist() == [2, 0, 1, 3, 5]  # zero is zero, whatever its sign
    assert idx[0, -1] == 4


@pytest.mark.cpp
def test_no_images_is_no_work():
    y, idx = kernel()(torch.zeros(0, 5, 8), torch.zeros(0, 4), 2)
    assert y.shape == (0, 4, 8)
    assert idx.shape == (0, 2)


@pytest.mark.cpp
def test_the_page_s_example_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "plugin.md").read_text()
    (block,) = [text for text in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "TokenReorgKernel" in text]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "libevit_token_reorg.so").symlink_to(plugin_builds.host_library())
    names = {"x": torch.rand(2, 197, 384), "scores": torch.rand(2, 196)}
    exec(block, names)
    assert names["y"].shape == (2, 140, 384)


# ---- refusals


@pytest.mark.cpp
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 0}, "keep is 0, expected at most the number of candidates, 1 to 4"),
        ({"keep": 5}, "keep is 5, expected at most the number of candidates, 1 to 4"),
        ({"prefix": 9, "x": torch.zeros(2, 13, 8)}, "prefix is 9, expected 0 to 8"),
        ({"x": torch.zeros(1, 4098, 1), "scores": torch.zeros(1, 4097)}, "candidates is 4097, expected 1 to 4096"),
        ({"x": torch.zeros(2, 5, 0)}, "channels is 0"),
        ({"x": torch.zeros(2, 6, 8)}, "x and scores do not match"),
        ({"scores": torch.zeros(3, 4)}, "x and scores do not match"),
        ({"x": torch.zeros(2, 40)}, "x and scores do not match"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.float64)}, "unsupported types"),
        ({"scores": torch.zeros(2, 4, dtype=torch.float16)}, "unsupported types"),
        ({"x": torch.zeros(2, 5, 8, device="meta")}, "for tensors on cpu"),
        ({"cut": Cut(threads=65)}, "threads is 65, expected 0 to 64"),
        ({"cut": Cut(lanes=3)}, "lanes is 3, expected a power of two"),
        ({"cut": Cut(lanes=64)}, "lanes is 64"),
        ({"cut": Cut(tiles=-1)}, "tiles is -1"),
        ({"cut": Cut(slices=65)}, "slices is 65, expected 0 to 64"),
        ({"cut": Cut(early=3)}, "early is 3, expected 0 to 2"),
    ],
)
def test_a_wrong_call_is_refused(change, words):
    call = {"x": torch.zeros(2, 5, 8), "scores": torch.zeros(2, 4), "keep": 2, "prefix": 1} | change
    with pytest.raises(InputError, match=re.escape(words)):
        kernel()(**call)


@pytest.mark.cpp
def test_addresses_are_looked_at():
    x, scores = torch.zeros(2, 5, 8), torch.zeros(2, 4)
    idx = torch.zeros(2, 2, dtype=torch.int32)
    off = torch.zeros(2 * 4 * 8 * 4 + 1, dtype=torch.uint8)[1:]
    with pytest.raises(InputError, match="y is not aligned to its elements of 4 bytes"):
        kernel()(x, scores, 2, out=(off, idx))
    with pytest.raises(InputError, match="y is a null pointer"):
        kernel()(x, scores, 2, out=(torch.zeros(0), idx))


@pytest.mark.cpp
def test_indices_that_are_not_wanted_are_not_written():
    x, scores = torch.rand(2, 5, 8), torch.rand(2, 4)
    y = torch.full((2, 4, 8), -1.0)
    kernel()(x, scores, 2, out=(y, torch.zeros(0, dtype=torch.int32)))
    assert torch.equal(y, kernel()(x, scores, 2)[0])


@pytest.mark.cpp
def test_a_call_that_is_none_is_refused_with_and_without_room_for_a_message():
    run, message = kernel()._library.evit_token_reorg_on_host, ctypes.create_string_buffer(20)
    assert run(None, None, message, ctypes.c_size_t(len(message))) == 1
    assert message.value == b"TokenReorg: the cal"  # cut to the room there is
    assert run(None, None, None, ctypes.c_size_t(0)) == 1


@pytest.mark.cpp
def test_a_library_says_what_it_is_before_it_is_loaded(tmp_path):
    library = plugin_builds.host_library()
    identity = read_identity(library)
    assert (identity.kind, identity.abi, identity.architectures, identity.tensorrt) == ("host", ABI, (), None)
    project = (plugin_builds.PLUGINS / "CMakeLists.txt").read_text()
    package = (ROOT / "pyproject.toml").read_text()
    found = [
        re.search(pattern, text)
        for pattern, text in ((r"VERSION (\S+) DESC", project), (r'\nversion = "(.+)"', package))
    ]
    assert {match[1] for match in found if match} == {identity.version}

    other = tmp_path / "other.so"
    other.write_bytes(library.read_bytes().replace(b" abi=2 ", b" abi=3 "))
    with pytest.raises(InputError, match=r"a different interface \(got 3, expected 2\)"):
        TokenReorgKernel(other)
    other.write_bytes(
        b"\x7fELF" + library.read_bytes()[-60_000:]
    )  # what it says is in there, and nothing else is right
    with pytest.raises(MissingRequirement, match="the library cannot be loaded"):
        TokenReorgKernel(other)
    other.write_bytes(b"\x7fELF")
    with pytest.raises(InputError, match=r"not a library that evit-deploy built.*evit-deploy plugin build"):
        read_identity(other)
    with pytest.raises(InputError, match="the library cannot be read"):
        read_identity(tmp_path / "none.so")
    with pytest.raises(InputError, match="the library cannot be read"):
        read_identity(tmp_path)


# ---- with CUDA


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++-11", "g++-12", "g++-14", "clang++"])
def test_other_compilers_build_a_kernel_with_the_same_bits(compiler):
    plugin_builds.need("cmake", compiler)
    arguments = "-DEVIT_CUDA=OFF", f"-DCMAKE_CXX_COMPILER={compiler}"
    folder = plugin_builds.build(*arguments, targets=("evit_token_reorg_host",))
    other = TokenReorgKernel(folder / "libevit_token_reorg_host.so")
    for case in CASES[::5]:
        for dtype in TORCH:
            assert_same_bits(other(*call_of(case, dtype)), kernel()(*call_of(case, dtype)))


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++-11", "g++-12", "g++-14", "clang++"])
def test_nvcc_takes_these_compilers(compiler, tmp_path):
    plugin_builds.need("nvcc", compiler)
    source = plugin_builds.PLUGINS / "token_reorg" / "kernel.cu"
    arguments = "-ccbin", compiler, "-std=c++17", "-arch=sm_80", "-cubin", "-o", str(tmp_path / "kernel.cubin")
    plugin_builds.run("nvcc", *arguments, str(source))


@pytest.mark.nvcc
@pytest.mark.slow
def test_nvcc_compiles_every_architecture():
    identity = read_identity(plugin_builds.gpu_library())
    assert identity.kind == "kernel"
    assert identity.architectures == (
        "80-real",
        "86-real",
        "87-real",
        "89-real",
        "90-real",
        "100-real",
        "110-real",
        "120",
    )


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    library = TokenReorgKernel(plugin_builds.gpu_library())  # loading needs no driver
    with pytest.raises(InputError, match="this library is for tensors on cuda"):
        library(torch.zeros(2, 5, 8), torch.zeros(2, 4), 2)
    # What C++ would meet: the call goes through to CUDA, which has no driver to ask.
    message, tensors = ctypes.create_string_buffer(256), [torch.zeros(64) for _ in range(4)]
    call = _Call(*(tensor.data_ptr() for tensor in tensors), 0, 1, 1, 4, 8, 2, 1)
    status = library._library.evit_token_reorg(ctypes.byref(call), None, message, ctypes.c_size_t(256))
    assert status == 2
    assert re.match(rb"TokenReorg: .* \(cudaError\w+\)", message.value)


@cache
def gpu_kernel() -> TokenReorgKernel:
    return TokenReorgKernel(plugin_builds.gpu_library())


def on_gpu(call):
    x, scores, *rest = call
    return gpu_kernel()(x.cuda(), scores.cuda(), *rest)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@each_dtype
def test_the_gpu_gives_the_bits_of_the_host_build(dtype):
    for case in CASES:
        x, scores = case.inputs(dtype)
        call = call_of(case, dtype)
        y, idx = on_gpu(call)
        check_answer(case, dtype, x, scores, to_numpy(y.cpu()), to_numpy(idx.cpu()))
        if case.has_order:
            assert_same_bits((y, idx), kernel()(*call))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_it_can_be_captured_in_a_graph_and_repeats_its_bits(batch):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, 197, 384, device="cuda", dtype=torch.float16, generator=generator)
    scores = torch.rand(batch, 196, device="cuda", generator=generator) / 196
    wanted = gpu_kernel()(x, scores, 138)
    out = tuple(torch.full_like(part, -1) for part in wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu_kernel()(x, scores, 138, out=out)
    for _ in range(20):
        for part in out:
            part.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(out, wanted)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    calls = [
        ProgramCall(case, dtype, int(i % 3 == 2), CUTS[i % len(CUTS)])
        for i, case in enumerate(CASES)
        for dtype in TORCH
    ]
    runner = "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--log-file", "/dev/stderr"
    found = answers_of(plugin_builds.gpu_program(), calls, *runner)
    for call, answer in zip(calls, found, strict=True):
        check_answer(call.case, call.dtype, *call.case.inputs(call.dtype), *answer)
