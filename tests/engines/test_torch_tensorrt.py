"""The torch-tensorrt target: what it refuses, what it exports, and how far it gets without a GPU.

Torch-TensorRT needs torch 2.14. Tests of it run in its own environment (docs/torch-tensorrt.md) and skip elsewhere.
"""

import functools
import json
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from evit_deploy.engines import torch_tensorrt as target
from evit_deploy.environment.requirements import version_of
from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.export.precision import DTYPES
from evit_deploy.recipe.options import BatchProfile, BuildOptions
from evit_deploy.tokens.operators.token_reorg import select
from evit_deploy.tokens.reduce import reduce_tokens_
from tests.support.cases import CASES, Case
from tests.support.models import KEEP, KINDS, images, of_kind, seeded, tree
from tests.support.paths import ROOT

RANGE = BatchProfile(1, 4, 8)
FIXED = BatchProfile(3, 3, 3)


def options(*profiles: BatchProfile, **others: Any) -> BuildOptions:
    return BuildOptions(batches=tuple(map(msgspec.structs.astuple, profiles)), **others)


def build(folder: Path, *, precision: str = "fp16", profiles: Sequence[BatchProfile] = (RANGE,), **others: Any) -> Any:
    model: Any = torch.nn.Identity()
    model.num_classes = 10  # by which the engine's output is named
    return target.build_torch_tensorrt(
        model, folder / "engine.plan", folder / "model.pt2", precision=precision,
        options=options(*profiles, **others),
    )  # fmt: skip


EXPORT = target.export_program
installed = pytest.mark.skipif(
    not any(map(version_of, target.DISTRIBUTIONS)), reason="Torch-TensorRT is not in this environment"
)


def here(monkeypatch: pytest.MonkeyPatch, gpu: bool, **versions: str) -> None:
    monkeypatch.setattr(target, "version_of", lambda name: versions.get(name.replace("-", "_")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        ({"torch": "2.15.0"}, ["torch 2.14 (here: 2.15.0)", "torch-tensorrt 2.14 (here: not installed)", "are needed"]),
        ({"torch": "2.14.1+cu130"}, ["torch-tensorrt 2.14 (here: not installed) is needed"]),
        ({"torch": "2.14.1", "torch_tensorrt": "2.13.0"}, ["torch-tensorrt 2.14 (here: 2.13.0) is needed"]),
        ({"torch": "2.140", "torch_tensorrt_rtx": "2.14.0"}, ["torch 2.14 (here: 2.140) is needed"]),
    ],
)
def test_what_is_missing_is_named_with_the_line_that_helps(monkeypatch, versions, named):
    here(monkeypatch, gpu=True, **versions)
    with pytest.raises(MissingRequirement) as caught:
        target.require_torch_tensorrt()
    for text in (*named, 'pip install -e ".[torch-tensorrt]"'):
        assert text in str(caught.value)
    assert "GPU" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_missing_gpu_is_said_with_the_packages_and_alone(monkeypatch):
    here(monkeypatch, gpu=False, torch="2.15.0")
    with pytest.raises(MissingRequirement, match="also needs a CUDA GPU"):
        target.require_torch_tensorrt()
    here(monkeypatch, gpu=False, torch="2.14.1", torch_tensorrt_rtx="2.14.0")
    with pytest.raises(MissingRequirement, match=r"this machine has no GPU\. Run it on a machine with an NVIDIA GPU"):
        target.require_torch_tensorrt()


def test_a_package_that_cannot_be_imported_is_an_environment_to_make_anew(monkeypatch):
    def refuse(name: str) -> Any:
        raise OSError("libcudart.so.13: cannot open shared object file")

    here(monkeypatch, gpu=True, torch="2.14.1", torch_tensorrt="2.14.0")
    monkeypatch.setattr(target.importlib, "import_module", refuse)
    with pytest.raises(MissingRequirement, match=r"cannot be imported \(libcudart"):
        target.require_torch_tensorrt()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"precision": "int8"}, "cannot make int8: quantization happens in the ONNX file"),
        ({"precision": "fp8"}, "For fp8 use --target tensorrt"),
        ({"precision": "fp64"}, "expected fp32, fp16, bf16"),
        ({"profiles": []}, "got none, expected one MIN:OPT:MAX"),
        ({"profiles": [FIXED, RANGE]}, "no way to choose between optimization profiles (got 3:3:3, 1:4:8"),
        ({"profiles": [BatchProfile(1, 8, 4)]}, "got 1:8:4"),
        ({"profiles": [BatchProfile(0, 1, 4)]}, "batches: this number does not fit (got ((0, 1, 4),)"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_else(tmp_path, asked, message):
    with pytest.raises(InputError) as caught:
        build(tmp_path, **asked)
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path):
    with pytest.raises(MissingRequirement):
        target.build_torch_tensorrt(seeded(), tmp_path / "a", tmp_path / "b", precision="fp16", options=options(RANGE))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_plain_sort_chooses_as_the_op_does(case: Case):
    scores = torch.from_numpy(case.inputs("fp32")[1])
    kept = target._sort(scores, stable=True, dim=1, descending=True)[1][:, : case.keep]
    assert all(len(set(row)) == case.keep for row in kept.tolist())
    if case.has_order:  # a plain sort leaves ties open: the same scores in the same order is what it owes
        assert torch.equal(scores.gather(1, kept), scores.gather(1, select(scores, case.keep)))


def difference(program: torch.export.ExportedProgram, model: Any, count: int) -> float:
    x = torch.from_numpy(images(model, count))
    with torch.no_grad():
        got, wanted = program.module()(x), model(x)
    assert got.dtype == torch.float32
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    "kind", ["plain"] + [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "plain"]
)
def test_the_exported_program_is_the_model(kind):
    model = reduce_tokens_(of_kind(kind), KEEP)
    program = target.export_program(model, "fp32", RANGE, device="cpu")
    operations = {str(node.target) for node in program.graph.nodes}
    assert "aten.sort.default" in operations
    assert "aten.sort.stable" not in operations
    for count in (1, 3, 8):
        assert difference(program, model, count) < 1e-5


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.05), ("bf16", 0.3)])
def test_precision_is_cast_between_float32_ends_and_the_model_stays(precision, limit):
    model = reduce_tokens_(seeded(), KEEP)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = target.export_program(model, precision, RANGE, device="cpu")
    assert {value.dtype for value in program.state_dict.values()} == {DTYPES[precision]}
    assert difference(program, model, 2) < limit
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    sorts = [node for node in program.graph.nodes if str(node.target) == "aten.sort.default"]
    assert {node.args[0].meta["val"].dtype for node in sorts} == {torch.float32}


@pytest.mark.parametrize(
    ("profile", "counts"), [(BatchProfile(3, 4, 5), (3, 4, 5)), (FIXED, (3,)), (BatchProfile(1, 1, 1), (1,))]
)
def test_the_program_takes_the_batches_of_its_profile(profile, counts):
    model = reduce_tokens_(of_kind("smallest"), KEEP)
    program = target.export_program(model, "fp32", profile, device="cpu")
    for count in counts:
        assert difference(program, model, count) < 1e-5
    with pytest.raises(Exception, match=r"(?i)batch|guard|expected"):
        program.module()(torch.zeros(max(counts) + 1, 3, 64, 64))


class Package:
    """Stands in for torch_tensorrt: notes what it is told, and writes what it is meant to."""

    __version__ = "2.14.0"

    def __init__(self, fail: str | None = None) -> None:
        self.fail, self.told = fail, {}
        self.dynamo = self

    def _call(self, name: str, **told: Any) -> None:
        self.told[name] = told
        if self.fail == name:
            raise RuntimeError("wrapped") from ValueError("no kernel for this.\nsecond line")

    def Input(self, **told: Any) -> dict[str, Any]:  # noqa: N802 -- as it is called there
        return told

    def convert_exported_program_to_serialized_trt_engine(self, exported: Any, **told: Any) -> bytes:
        self._call("convert", **told)
        return b"plan"

    def compile(self, exported: Any, **told: Any) -> str:
        self._call("compile", **told)
        return "compiled"

    def save(self, compiled: str, path: str, **told: Any) -> None:
        Path(path).write_text(compiled)
        self._call("save", **told)


@functools.cache
def exported(profile: BatchProfile) -> torch.export.ExportedProgram:
    return EXPORT(reduce_tokens_(of_kind("smallest"), KEEP), "fp16", profile, device="cpu")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """A machine on which everything is there; gives a function that installs the package."""

    def install(package: Package, runtime: str = "tensorrt") -> Package:
        monkeypatch.setattr(target, "export_program", lambda model, precision, profile, device: exported(profile))
        monkeypatch.setattr(target, "require_torch_tensorrt", lambda: package)
        library = types.SimpleNamespace(__version__="11.1.0", _package_name=runtime)
        monkeypatch.setitem(sys.modules, "tensorrt", library)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        return package

    return install


def test_both_files_are_written_and_what_they_were_built_with_is_told(pretend, tmp_path):
    package = pretend(Package())
    engine = build(tmp_path, optimization_level=4, workspace=1024, hardware_compatible=True)
    assert tree(tmp_path) == {"engine.plan": b"plan", "model.pt2": b"compiled"}
    assert (engine.target, engine.version, engine.gpus, engine.precision) == (
        "torch-tensorrt",
        "11.1.0",
        ("sm90",),
        "fp16",
    )
    assert engine.profiles == (RANGE,)
    assert engine.plugin is None
    assert engine.options["optimization_level"] == 4
    assert engine.options["runtime"] == "tensorrt"
    assert package.told["convert"]["arg_input_binding_names"] == ("input",)
    assert package.told["convert"]["output_binding_names"] == "logits"
    for name in ("convert", "compile"):
        told = package.told[name]
        assert told["require_full_compilation"] is True
        assert told["workspace_size"] == 1 << 30
        assert told["hardware_compatible"] is True
        (given,) = told["arg_inputs"]
        shapes = [tuple(shape[0] for shape in profile.values()) for profile in given["profiles"]]
        assert shapes == [(1, 4, 8)]
        assert not Path(told["timing_cache_path"]).exists()
        assert tmp_path in Path(told["timing_cache_path"]).parents
    assert package.told["save"]["output_format"] == "exported_program"


def test_one_batch_size_is_a_static_shape(pretend, tmp_path):
    package = pretend(Package())
    build(tmp_path, profiles=[FIXED])
    assert package.told["compile"]["arg_inputs"][0]["shape"] == (3, 3, 64, 64)
    assert package.told["save"]["dynamic_shapes"] == {"images": {}}


@pytest.mark.parametrize("step", ["convert", "compile", "save"])
def test_a_failed_build_leaves_nothing_and_says_what_was_at_the_root(pretend, tmp_path, step):
    pretend(Package(fail=step))
    with pytest.raises(StageError, match=r"could not build the engine: no kernel for this\. Nothing was written"):
        build(tmp_path)
    assert tree(tmp_path) == {}


def test_a_plan_that_cannot_be_written_takes_the_program_with_it(pretend, tmp_path):
    pretend(Package())
    (tmp_path / "engine.plan").mkdir()
    with pytest.raises(StageError, match="could not be written"):
        build(tmp_path)
    assert not (tmp_path / "model.pt2").exists()


def test_tensorrt_rtx_has_no_hardware_compatibility_level(pretend, tmp_path):
    pretend(Package(), runtime="tensorrt_rtx")
    with pytest.raises(InputError, match="no hardware compatibility level"):
        build(tmp_path, hardware_compatible=True)
    assert tree(tmp_path) == {}


# Torch-TensorRT 2.14 asks for a device while it is imported (pytorch/TensorRT#4504); TensorRT-RTX builds without one
# but cannot load what it built. With stand-ins for these the real converters and the real builder run.
WITHOUT_DRIVER = """
import json, sys, types
import torch
torch.cuda.get_device_capability = lambda device=None: (8, 0)
torch.cuda.current_device = lambda: 0
torch.cuda.mem_get_info = lambda device=None: (2, 2)
import torch_tensorrt
import tensorrt
from torch_tensorrt.dynamo import partitioning
from tests.support.models import KEEP, of_kind
from evit_deploy.engines import torch_tensorrt as target
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.tokens.reduce import reduce_tokens_

kind, precision, plan = sys.argv[1:4]
profile = BatchProfile(*json.loads(sys.argv[4]))
program = target.export_program(reduce_tokens_(of_kind(kind), KEEP), precision, profile, device="cpu")

seen = []
construct = partitioning.construct_submodule_inputs
def look(*arguments, **options):
    found = construct(*arguments, **options)
    seen.extend(found)
    return found
partitioning.construct_submodule_inputs = look
compiled = torch_tensorrt.dynamo.compile(
    program, arg_inputs=(target._input(torch_tensorrt, program, profile),), require_full_compilation=True, dryrun=True
)

class Runtime:
    def __init__(self, logger): pass
    def deserialize_cuda_engine(self, plan):
        return types.SimpleNamespace(serialize=lambda: plan, get_aliased_input_tensor=lambda name: None)
tensorrt.Runtime = Runtime
options = {"truncate_double": True, "disable_tf32": True, "optimization_level": 3, "workspace_size": 1 << 30}
with open(plan, "wb") as file:
    file.write(target.lower_to_plan(torch_tensorrt, program, profile, options))
print(json.dumps({
    "runtime": tensorrt._package_name,
    "calls": [str(node.target) for node in compiled.graph.nodes if node.op.startswith("call")],
    "arguments": [node.name for node in compiled.graph.nodes if node.op == "placeholder"],
    "profiles": [[shape[0] for shape in entry.values()] for entry in seen[0].profiles or []],
}))
"""


@installed
@pytest.mark.slow
@pytest.mark.skipif(version_of("torch-tensorrt-rtx") is None, reason="only TensorRT-RTX builds without a GPU")
@pytest.mark.parametrize(
    ("kind", "precision", "profile"),
    [
        ("plain", "fp16", RANGE),
        ("plain", "bf16", RANGE),
        ("plain", "fp32", RANGE),
        ("plain", "fp16", FIXED),
        ("distilled", "fp16", RANGE),
        ("layer scale", "fp16", RANGE),
        ("registers, no classes", "fp16", RANGE),
        ("qk-norm, one channel", "fp16", RANGE),
    ],
)
def test_every_operation_is_converted_into_one_engine(tmp_path, kind, precision, profile):
    plan = tmp_path / "engine.plan"
    batches = [profile.minimum, profile.optimum, profile.maximum]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DRIVER, kind, precision, str(plan), json.dumps(batches)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["calls"] == ["_run_on_acc_0"]  # one engine, nothing left to PyTorch
    assert told["arguments"] == ["images"]
    assert told["profiles"] == ([] if profile is FIXED else [batches])
    content = plan.read_bytes()
    assert content[:4] == b"vtrt"
    assert b"input" in content
    assert b"logits" in content


@pytest.fixture(scope="module")
def package() -> Any:
    try:
        return target.require_torch_tensorrt()
    except MissingRequirement as missing:
        pytest.skip(str(missing))


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-3), ("fp16", 0.05), ("bf16", 0.3)])
def test_the_program_answers_as_the_model_does(package, tmp_path, precision, limit):
    model = reduce_tokens_(seeded(), KEEP)
    target.build_torch_tensorrt(
        model, tmp_path / "engine.plan", tmp_path / "model.pt2", precision=precision, options=options(RANGE)
    )
    program = package.load(str(tmp_path / "model.pt2")).module()
    for count in (1, 4, 8):
        x = torch.from_numpy(images(model, count))
        with torch.no_grad():
            wanted = model(x)
        got = program(x.cuda())
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.cpu(), wanted, rtol=0, atol=limit * float(wanted.abs().max()))


@pytest.mark.gpu
def test_the_plan_is_a_plain_one_with_the_contract_names(package, tmp_path):
    import tensorrt

    model = reduce_tokens_(of_kind("smallest"), KEEP)
    engine = target.build_torch_tensorrt(
        model, tmp_path / "engine.plan", tmp_path / "model.pt2", precision="fp16", options=options(RANGE)
    )
    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
    loaded = runtime.deserialize_cuda_engine((tmp_path / "engine.plan").read_bytes())
    names = [loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)]
    assert names == ["input", "logits"]
    assert {loaded.get_tensor_dtype(name) for name in names} == {tensorrt.DataType.FLOAT}
    assert loaded.num_optimization_profiles == 1
    assert [loaded.get_tensor_profile_shape("input", 0)[i][0] for i in range(3)] == [1, 4, 8]
    assert engine.version == tensorrt.__version__
