"""What evit-deploy needs and what of it is installed: here as it is, and in made-up places with real files."""

import importlib
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import evit_deploy
from evit_deploy.environment.requirements import (
    EXTRAS,
    bounds,
    fault,
    install_line,
    lacking,
    needed,
    require_extra,
    version_of,
)
from evit_deploy.errors import InputError, MissingRequirement
from tests.support.machines import environment_without, pretend
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# ---- versions and extras


def stated(extra: str | None = None) -> dict[str, str]:
    """Package -> versions, read off the text of the installed metadata."""
    found = {}
    for line in importlib.metadata.requires("evit-deploy") or []:
        requirement, _, marker = line.partition("; extra == ")
        package, versions = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?([\d.,<>=~]+)", requirement).groups()
        if marker.strip("'\"") == (extra or ""):
            found[package] = versions
    return found


def test_every_bound_is_the_metadata_s():
    assert stated()
    assert {name: str(requirement.specifier) for name, requirement in needed().items()} == stated()
    for extra in EXTRAS:
        assert stated(extra)
        assert {name: str(requirement.specifier) for name, requirement in needed(extra).items()} == stated(extra)


def test_every_extra_has_a_purpose_and_is_shown():
    shown = {*EXTRAS, "dev", "docs"}
    assert set(importlib.metadata.metadata("evit-deploy").get_all("Provides-Extra") or []) == shown
    assert set(PROJECT["optional-dependencies"]) == shown


def test_markers_decide_what_is_needed_here(place):
    requires = [
        "torch>=2.11",
        "Old_Name>=1; python_version < '3'",
        "tomlkit>=1; python_version >= '3'",
        "openvino<2027,>=2025.4; extra == 'openvino'",
        "colorama; python_version < '3' and extra == 'openvino'",
        "Nvidia.ML_py>=12; python_version >= '3' and extra == 'openvino'",
    ]
    pretend(place, "evit-deploy", "9", requires=requires)
    assert list(needed()) == ["torch", "tomlkit"]
    assert list(needed("openvino")) == ["openvino", "nvidia-ml-py"]
    assert bounds(needed("openvino")["openvino"]) == ">=2025.4,<2027"
    assert needed("tensorrt") == {}


@pytest.mark.parametrize(
    ("version", "versions", "fits"),
    [
        ("2.15.0+cu132", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("10.14.1.48.post1", ">=10.15", False),
        ("10.15.1.29", ">=10.15", True),
        ("10.15", ">=10.15", True),
        ("2.14.3", ">=2.14,<2.15", True),
        ("2.14.1+cu130", ">=2.14,<2.15", True),
        ("2.15.0", ">=2.14,<2.15", False),
        ("2.15.0+cu132", ">=2.14,<2.15", False),
        ("2026.4.1", ">=2025.4", True),
        # pre-releases count, and come before their release
        ("2.12.0a0+git1234", ">=2.11", True),
        ("2.11.0rc1", ">=2.11", False),
        ("2.15.0.dev20261101", ">=2.14,<2.15", False),
        ("unknown", ">=1", False),
    ],
)
def test_versions_are_judged_as_pip_does(place, version, versions, fits):
    pretend(place, "torch", version)
    clause = fault(Requirement(f"torch{versions}"))
    assert clause == (None if fits else f"torch is {version}, needed {versions}")


def test_what_is_required_here_is_here():
    assert [fault(requirement) for requirement in needed().values()] == [None] * len(needed())


def test_metadata_without_a_version_is_no_installation(place):
    pretend(place, "timm", None)
    assert version_of("timm") is None


def test_a_package_that_is_missing():
    requirement = Requirement("no-such-package>=1")
    assert fault(requirement) == "no-such-package is not installed"


def test_an_extra_that_is_missing():
    if version_of("tensorrt"):
        pytest.skip("TensorRT is installed")
    with pytest.raises(MissingRequirement) as caught:
        require_extra("tensorrt")
    least = needed("tensorrt")["tensorrt"].specifier
    assert str(caught.value).startswith("tensorrt: ")
    assert "tensorrt is not installed" in caught.value.what
    assert f'"tensorrt{least}"' in str(caught.value.fix)
    assert caught.value.exit_code == 3


def test_an_extra_with_the_wrong_versions(place):
    pretend(place, "tensorrt", "10.14.1.48.post1")
    pretend(place, "polygraphy", "0.49.9")
    pretend(place, "nvidia-ml-py", "13.580.82")
    pretend(place, "torch-tensorrt", "2.15.0")
    assert sorted(lacking("tensorrt")) == [
        f"polygraphy is 0.49.9, needed {stated('tensorrt')['polygraphy']}",
        f"tensorrt is 10.14.1.48.post1, needed {stated('tensorrt')['tensorrt']}",
    ]
    assert f"torch-tensorrt is 2.15.0, needed {bounds(needed('torch-tensorrt')['torch-tensorrt'])}" in lacking(
        "torch-tensorrt"
    )


# ---- the lines that install


@pytest.mark.parametrize("name", [*EXTRAS, *needed(), "nvidia-ml-py"])
def test_a_line_has_packages_with_their_bounds(name):
    """Each argument is what pip takes, and a requirement of the metadata, as it stands there."""
    command, action, *arguments = shlex.split(install_line(name))
    assert (command, action) == ("pip", "install")
    known = [requirement for extra in ("", *EXTRAS) for requirement in needed(extra).values()]
    wanted = needed(name) if name in EXTRAS else {name}
    assert arguments
    for argument in map(Requirement, arguments):
        assert argument.name in wanted
        match = [one for one in known if (one.name, one.specifier) == (argument.name, argument.specifier)]
        assert match[0].extras == argument.extras


def test_a_line_for_an_extra_leaves_alone_what_is_there(place):
    """A TensorRT for CUDA 12 must not get the one for CUDA 13 beside it."""
    requires = ["nvidia-ml-py>=12", "polygraphy>=0.53", "tensorrt<12,>=10.15", "tritonclient[http,grpc]>=2.51"]
    pretend(place, "evit-deploy", "9", requires=[f"{line}; extra == 'tensorrt'" for line in requires])
    pretend(place, "tensorrt-cu12", "11.4.0.106")
    pretend(place, "polygraphy", "0.49.9")
    pretend(place, "nvidia-ml-py", "13.580.82")
    pretend(place, "tritonclient", "2.50")
    assert install_line("tensorrt") == 'pip install "polygraphy>=0.53" "tritonclient[grpc,http]>=2.51"'
    for name, version in (("polygraphy", "0.53.6"), ("tritonclient", "2.73.0")):
        shutil.rmtree(next(place.glob(f"{name}-*")))
        pretend(place, name, version)
    importlib.invalidate_caches()
    assert install_line("tensorrt") == (
        'pip install "nvidia-ml-py>=12" "polygraphy>=0.53" "tensorrt>=10.15,<12" "tritonclient[grpc,http]>=2.51"'
    )


def test_files_that_were_never_installed(tmp_path):
    """A source tree on PYTHONPATH has no metadata: that is said, with the line that installs it."""
    (tmp_path / "packages").mkdir()
    environment = environment_without(tmp_path / "packages", "evit_deploy")

    def said(code: str) -> str:
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    root = Path(evit_deploy.__file__).parents[1]
    requirements = "from evit_deploy.environment.requirements import *\n"
    assert said("import evit_deploy.cli as cli; cli.invoke(['--version'])") == evit_deploy.__version__
    assert said(requirements + "print(install_line('triton'))") == f'pip install -e "{root}[triton]"'
    assert said(requirements + "print(install_line('torch'))") == f'pip install -e "{root}"'
    what = "evit-deploy is not installed, so which versions it needs is unknown"
    code = "try: require_extra('openvino')\nexcept MissingRequirement as error: print(error)"
    assert said(requirements + code) == f'openvino: {what}. Run: pip install -e "{root}[openvino]"'
    code = "from evit_deploy.targets.target import available\nimport msgspec\n"
    code += "print(msgspec.json.encode(available()).decode())"
    for target in json.loads(said(code)):
        assert target["reasons"] == [what]
        assert not target["builds"]
        assert str(root) in target["fix"]
    code = "from evit_deploy.doctor.doctor import doctor\nimport json\n"
    code += "print(json.dumps([(f.name, f.fix) for f in doctor().broken]))"
    assert json.loads(said(code)) == [["evit-deploy", f'pip install -e "{root}"']]


def test_scikit_learn_is_needed_for_its_digits_alone(tmp_path):
    (tmp_path / "packages").mkdir()
    environment = environment_without(tmp_path / "packages", "scikit_learn", "sklearn", "scipy")
    code = """
import importlib, pkgutil
import evit_deploy
from evit_deploy.data.training.digits.digits import digits_images
from evit_deploy.data.images import sample_photographs
from evit_deploy.errors import MissingRequirement

for module in pkgutil.walk_packages(evit_deploy.__path__, "evit_deploy."):
    if not module.name.startswith("evit_deploy.serving.server_files."):  # these run in the server
        importlib.import_module(module.name)
print([image.size for image in sample_photographs()])
try:
    digits_images()
except MissingRequirement as error:
    print(error)
"""
    command = [sys.executable, "-S", "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    missing = "digits: scikit-learn is not installed"
    assert said == ["[(640, 427), (640, 427)]", f'{missing}. Run: pip install "scikit-learn>=1.4"']


def test_a_wheel_for_one_cuda_version_counts(place):
    pretend(place, "tensorrt-cu12", "11.4.0.106")
    assert version_of("tensorrt") == "11.4.0.106"


def test_there_is_no_such_extra():
    with pytest.raises(InputError, match=r"unknown extra \(got 'tensorflow', expected one of openvino, tensorrt"):
        require_extra("tensorflow")
