"""The contract of a target, over everything that is registered: ours, and those of packages that are installed."""

import shutil
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import DENSE, MODEL
from evit_deploy.errors import EvitDeployError
from evit_deploy.recipe.fields import field_docs
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.registry import RUNTIMES, TARGETS
from evit_deploy.report.report import Report
from evit_deploy.serving.options import Purpose
from evit_deploy.targets.target import PORTABLE, PRECISIONS, Artifact, Exported, Target
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.models import KEEP, seeded

EVERY = sorted(TARGETS.names())
MARKS = {"openvino": pytest.mark.openvino, "tensorrt": pytest.mark.tensorrt, "tensorrt-rtx": pytest.mark.tensorrt_rtx}
OPTIONS: dict[str, Any] = {"tensorrt-rtx": BuildOptions(gpus=("sm80",), batches=((1, 2, 4),), optimization_level=0)}
"""Where the defaults make nothing on a machine without a GPU."""


def marked() -> list[Any]:
    return [pytest.param(name, marks=MARKS.get(name, ())) for name in EVERY]


@pytest.mark.parametrize("name", EVERY)
def test_what_a_target_says_of_itself_fits_the_rest(name):
    target = TARGETS.get(name)
    assert issubclass(target, Target)
    assert target.__doc__
    assert set(target.precisions) <= set(PRECISIONS)
    assert set(target.runtimes) <= set(RUNTIMES.names())
    assert set(target.platforms) <= set(typing.get_args(Purpose))
    runs = {file for runtime in target.runtimes for file in RUNTIMES.get(runtime).files}
    for _, files in target.platforms.values():
        assert not target.runtimes or runs & set(files)  # Torch-TensorRT's engine is proven in another environment


@pytest.mark.parametrize("name", EVERY)
def test_options_have_defaults_and_documentation(name):
    options = TARGETS.get(name).Options
    assert issubclass(options, msgspec.Struct)
    assert isinstance(options(), options)
    assert field_docs(options).keys() == set(options.__struct_fields__)


@pytest.mark.parametrize("name", EVERY)
def test_reasons_are_given_and_not_raised(name):
    target = TARGETS.get(name)
    assert isinstance(target.automatic(), bool)
    for precision in target.precisions:
        for options in (target.Options(), OPTIONS.get(name, target.Options())):
            reasons = target.refuse(precision, options)
            assert isinstance(reasons, list)
            assert all(isinstance(reason, EvitDeployError) for reason in reasons)
            assert set(target.provers(precision, options)) <= set(RUNTIMES.names())


def test_the_portable_target_is_always_made():
    assert TARGETS.get(PORTABLE).precisions == PRECISIONS
    assert not any(TARGETS.get(PORTABLE).refuse(precision, None) for precision in PRECISIONS)


@pytest.mark.parametrize("name", marked())
def test_what_is_written_is_whole_and_can_be_run(name, converted: Bundle, tmp_path: Path):
    target = TARGETS.get(name)
    options = OPTIONS.get(name, target.Options())
    reasons = target.refuse("fp32", options)
    if reasons:
        pytest.skip(f"it cannot be made here: {reasons[0]}")
    for file in (MODEL, DENSE):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(converted.file(file), tmp_path / file)
    model = reduce_tokens_(seeded(), KEEP)
    exported = Exported(model, seeded(), token_plan(model), "fp32", tmp_path)
    artifacts = target.write(exported, options)
    assert sorted(artifact.dense for artifact in artifacts) == [False, True]
    for artifact in artifacts:
        assert isinstance(artifact, Artifact)
        place = artifact.path.relative_to(tmp_path / "dense" if artifact.dense else tmp_path)
        runners = [RUNTIMES.get(runtime) for runtime in target.runtimes]
        able = [runner for runner in runners if str(place) in runner.files and not runner.accepts(artifact.path)]
        assert able or not runners
        assert (artifact.engine is not None) is target.engine
    for _, files in target.platforms.values():
        assert all((tmp_path / folder / file).is_file() for file in files for folder in ("", "dense"))
    assert isinstance(target.audit(artifacts, exported.plan), Report)
