"""The contract that every registered target signs, and a target that another package adds."""

import importlib.metadata
import sys
import typing
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest

from evit_deploy.bundle.manifest import DENSE, ENGINE, MODEL, OPENVINO
from evit_deploy.errors import EvitDeployError, InputError
from evit_deploy.export.precision import PRECISIONS
from evit_deploy.pipeline.convert import convert
from evit_deploy.pipeline.lowering import lowering
from evit_deploy.recipe.fields import field_docs
from evit_deploy.recipe.options import BuildOptions, ConvertOptions, ProfileOptions
from evit_deploy.registry import RUNTIMES, TARGETS, Registry
from evit_deploy.report.report import Check, Report
from evit_deploy.serving.options import Platform, Purpose
from evit_deploy.targets import target as contract
from evit_deploy.targets.target import PORTABLE, Artifact, Exported, Target, all_targets
from evit_deploy.tokens.reduce import dense_twin, token_plan
from tests.support.exports import exported, reduced

each = pytest.mark.parametrize("name", TARGETS.names())
MARKS = {"openvino": pytest.mark.openvino, "tensorrt": pytest.mark.tensorrt, "tensorrt-rtx": pytest.mark.tensorrt_rtx}
ABLE = {"tensorrt-rtx": {"gpus": ("sm80",), "batches": ((1, 2, 4),)}}
"""Options with which a target can be made on a machine without a GPU."""


def test_precisions_are_those_of_the_files():
    assert contract.PRECISIONS == PRECISIONS
    assert set(typing.get_args(ConvertOptions.__annotations__["precision"])[0].__args__) == set(PRECISIONS)


@each
def test_what_it_says_of_itself_holds_together(name):
    target: type[Target] = TARGETS.get(name)
    assert issubclass(target, Target)
    assert set(target.precisions) <= set(PRECISIONS)
    assert issubclass(target.Options, msgspec.Struct)
    assert set(field_docs(target.Options)) == set(target.Options.__struct_fields__)  # each one is documented
    assert set(target.runtimes) <= set(RUNTIMES.names())
    for purpose, (platform, files) in target.platforms.items():
        assert purpose in typing.get_args(Purpose)
        assert platform in typing.get_args(Platform)
        assert files
        assert target.engine == (ENGINE in files)
    assert target.automatic() in (True, False)


@each
def test_values_out_of_range_are_refused_and_not_raised(name):
    target: type[Target] = TARGETS.get(name)
    if target.Options is not BuildOptions:
        assert target.refuse(target.precisions[0], target.Options()) == []
        return
    for error in (found := target.refuse("fp16", BuildOptions(batches=((8, 4, 1),)))):
        assert isinstance(error, EvitDeployError)
    assert "--batch" in str(found[0])


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in TARGETS.names()])
def test_its_files_are_those_it_names(name, tmp_path):
    target: type[Target] = TARGETS.get(name)
    options = target.Options(**ABLE.get(name, {}))
    if refusals := target.refuse("fp16", options):
        pytest.skip(f"cannot be made here: {refusals[0].what}")
    (tmp_path / DENSE).parent.mkdir()
    model = reduced("plain")
    onnx.save(in_fp16(exported("plain")), tmp_path / MODEL)
    onnx.save(in_fp16(exported("plain", None)), tmp_path / DENSE)
    made = Exported(model, dense_twin(model), token_plan(model), "fp16", tmp_path)
    artifacts = target.write(made, options)
    assert sorted(artifact.dense for artifact in artifacts) == [False, True]
    for artifact in artifacts:
        assert artifact.path.is_file()
        assert artifact.path.is_relative_to(tmp_path)
        assert artifact.dense == artifact.path.is_relative_to(tmp_path / "dense")
        place = artifact.path.relative_to(tmp_path / "dense" if artifact.dense else tmp_path).as_posix()
        for runtime in map(RUNTIMES.get, target.runtimes):
            assert place in runtime.files
            assert runtime.accepts(artifact.path) == []
        assert (artifact.engine is not None) == target.engine
        runners = [RUNTIMES.get(runtime) for runtime in target.runtimes]
        place = artifact.path.relative_to(tmp_path / "dense" if artifact.dense else tmp_path).as_posix()
        assert not runners or any(place in runner.files and not runner.accepts(artifact.path) for runner in runners)
        if artifact.engine is not None:
            assert (artifact.engine.target, artifact.engine.precision) == (name, "fp16")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {file for _, named in target.platforms.values() for file in named} <= files
    report = target.audit(artifacts, made.plan)
    assert isinstance(report, Report)
    assert report.passed, report.failed
    assert bool(report.checks) == target.engine  # an engine is looked into
    assert set(target.provers("fp16", options)) <= set(RUNTIMES.names())


def in_fp16(proto: onnx.ModelProto) -> onnx.ModelProto:
    from evit_deploy.export.precision import set_precision

    return set_precision(proto, "fp16")


def test_an_engine_that_is_not_what_was_asked_for_fails_its_audit(tmp_path):
    """A build whose attention was taken apart, with no listing to look into."""
    pytest.importorskip("tensorrt_rtx")
    from evit_deploy.bundle.manifest import Engine
    from evit_deploy.engines.build import Built

    onnx.save(exported("plain"), tmp_path / MODEL)
    (tmp_path / ENGINE).write_bytes(b"no listing")
    engine = Engine("tensorrt-rtx", "1.7", ("sm80",), None, "fp16", (), None, {}, 1.0)
    made = Artifact(tmp_path / ENGINE, False, engine, Built(engine, 0, None))
    report = TARGETS.get("tensorrt-rtx").audit([made], token_plan(reduced("plain")))
    assert not report.passed


def test_the_portable_file_comes_first_and_is_proven_where_bf16_cannot_run():
    assert PORTABLE in all_targets()
    assert lowering(ConvertOptions(targets=("onnx",))).targets == (PORTABLE,)
    assert TARGETS.get(PORTABLE).provers("bf16", None) == ("openvino",)
    assert TARGETS.get(PORTABLE).provers("fp32", None) == ("onnxruntime",)


# ---- a target of another package


class TextOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a target for tests."""

    word: str = "tokens"
    """What stands in the file."""


class Text(Target):
    """Writes a word into ``word.txt``."""

    Options = TextOptions
    precisions = ("fp32",)

    @classmethod
    def refuse(cls, precision: str, options: TextOptions) -> list[EvitDeployError]:
        return [InputError("no word", where="word")] if not options.word else []

    @classmethod
    def write(cls, exported: Exported, options: TextOptions) -> list[Artifact]:
        places = [exported.folder / "word.txt", exported.folder / "dense" / "word.txt"]
        for place in places:
            place.write_text(options.word)
        return [Artifact(place, place != places[0]) for place in places]

    @classmethod
    def audit(cls, artifacts: list[Artifact], plan: Any) -> Report:
        same = artifacts[0].path.read_text() == "tokens"
        return Report(checks=(Check("word", artifacts[0].path.read_text(), "tokens", same),))


@pytest.fixture
def text(monkeypatch) -> str:
    """The target, as the entry point of another package gives it."""
    point = importlib.metadata.EntryPoint("text", f"{__name__}:Text", "evit_deploy.targets")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Text.__module__])
    mine = Registry("target", dict(TARGETS._targets))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] * (group == point.group))
    for module in list(sys.modules.values()):
        if getattr(module, "TARGETS", None) is TARGETS:
            monkeypatch.setattr(module, "TARGETS", mine)
    return "text"


def test_a_target_of_another_package_is_made_checked_and_given_its_options(text, checkpoint_file, tmp_path):
    quick = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    asked = ConvertOptions(targets=(text,), target_options={text: {"word": "tokens"}})
    bundle, report = convert(checkpoint_file, keep_rate=0.6, options=asked, measure=quick, out=tmp_path / "out")
    assert {"word.txt", "dense/word.txt", MODEL} <= set(bundle.manifest.files)
    assert "word" in {check.name for check in report.checks}
    assert OPENVINO not in bundle.manifest.files


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"target_options": {"text": {"wrod": "x"}}}, "text does not take these options"),
        ({"target_options": {"text": {"word": ""}}}, "word: no word"),
        ({"precision": "fp16"}, "text has no fp16.*expected fp32.*Use --precision fp32"),
        ({"target_options": {"onnx": {"word": "x"}}}, "onnx does not take these options"),
        ({"target_options": {"openvino": {}}}, "options of a target that is not made"),
    ],
)
def test_its_refusals_come_before_any_work(text, options, hint):
    with pytest.raises(InputError, match=hint):
        lowering(ConvertOptions(targets=(text,), **options))


def test_no_other_module_knows_a_target_by_its_name():
    """Names stand in the registry and in the target's own file; what is called likewise is a package and its extra."""
    import evit_deploy

    root = Path(evit_deploy.__file__).parent
    literals = {
        path.relative_to(root).as_posix() for path in root.rglob("*.py") if '"torch-tensorrt"' in path.read_text()
    }
    assert literals == {
        "registry.py",
        "targets/torch_tensorrt.py",
        "engines/torch_tensorrt.py",  # builds for it
        "environment/requirements.py",  # the extra
        "doctor/doctor.py",  # the package
    }
