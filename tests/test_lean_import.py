"""Importing the package costs nothing, and the lazy names are what they say."""

import importlib
import importlib.util
import json
import subprocess
import sys
import types

import pytest

import evit_deploy

HEAVY = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "rich")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "statement",
    ["import evit_deploy", "import evit_deploy.registry, evit_deploy.errors, evit_deploy.tokens.plan"],
)
def test_importing_loads_nothing_heavy(statement):
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert "evit_deploy" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


def test_a_public_name_loads_only_its_own_module():
    code = "import sys, json, evit_deploy\nevit_deploy.TokenSpec\nprint(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert "evit_deploy.tokens.plan" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


def test_all_is_what_the_lazy_table_offers():
    offered = [name for names in evit_deploy._HOMES.values() for name in names]
    assert sorted(evit_deploy.__all__) == sorted(offered)
    assert len(set(offered)) == len(offered)
    assert set(evit_deploy.__all__) <= set(dir(evit_deploy))


@pytest.mark.parametrize("name", evit_deploy.__all__)
def test_every_public_name_exists_and_is_no_module(name):
    home = evit_deploy._HOME_OF[name]
    if importlib.util.find_spec(home) is None:
        pytest.skip(f"{home} is not written yet")
    importlib.import_module(home)  # sets verify, the module, on the package, unless the package looks after verify
    value = getattr(evit_deploy, name)
    assert not isinstance(value, types.ModuleType)
    assert value is getattr(sys.modules[home], name)
    assert value is getattr(evit_deploy, name)  # the second time as well


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'evit_deploy' has no attribute 'reduce_token'"):
        _ = evit_deploy.reduce_token
