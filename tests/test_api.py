"""The public API: what ``import evit_deploy as ed`` gives, and that it is closed under its own types."""

import ast
import importlib.util
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from PIL import Image

import evit_deploy as ed
from evit_deploy.registry import Registry
from tests.support.paths import ROOT

PACKAGE = ROOT / "evit_deploy"
OTHERS = {"PIL", "builtins", "collections", "msgspec", "numpy", "onnx", "pathlib", "torch", "types", "typing"}
"""Where types of public signatures may come from besides the package."""
MOST = 8
"""Parameters of a function; a struct counts as one, ``**options`` too."""
TIMM = {"ConvStem", "EvoLeViT", "LVViT"}  # their parameters are those of timm's models


def load(script: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions(name: str, value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A public function, or the public methods, properties and constructor of a class, the package's bases' too."""
    if inspect.isfunction(value):
        yield name, value
    for base in value.__mro__ if isinstance(value, type) else ():
        if base.__module__.split(".")[0] not in ("evit_deploy", __name__.split(".")[0]):
            continue
        for key, member in vars(base).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) and (key == "__init__" or not key.startswith("_")):
                yield f"{name}.{key}", function


def strangers(annotation: Any) -> Iterator[str]:
    """Classes in an annotation that are neither public nor of a package that everybody knows."""
    parts = typing.get_args(annotation)
    if parts:
        if typing.get_origin(annotation) is not typing.Literal:
            for part in parts:
                yield from [found for one in (part if isinstance(part, list) else [part]) for found in strangers(one)]
    elif isinstance(annotation, type) and annotation.__module__.split(".")[0] not in OTHERS:
        name = annotation.__name__
        if name not in ed.__all__ or getattr(ed, name) is not annotation:
            yield f"{annotation.__module__}.{name}"


def missing_types(name: str, value: Any) -> dict[str, list[str]]:
    """Types that the signatures and fields of a public name speak of and that cannot be imported from the top."""
    known: dict[str, Any] = {"Image": Image, "onnx": onnx, "torch": torch}  # imported for type checkers alone
    hints = {
        f"{where}({parameter})": hint
        for where, function in functions(name, value)
        for parameter, hint in typing.get_type_hints(function, localns=known).items()
    }
    if isinstance(value, type):
        hints |= {f"{name}.{field}": hint for field, hint in typing.get_type_hints(value, localns=known).items()}
    return {where: found for where, hint in hints.items() if (found := list(strangers(hint)))}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    names += [argument.arg for argument in (node.args.vararg, node.args.kwarg) if argument is not None]
    return len([name for name in names if name not in ("self", "cls")])


def test_dir_is_the_public_names_and_dunders():
    assert [name for name in dir(ed) if not name.startswith("__")] == sorted(ed.__all__)
    assert len(set(ed.__all__)) == len(ed.__all__)
    assert "__version__" in dir(ed)
    source = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in source.body if isinstance(node, ast.Import | ast.ImportFrom)]  # they would leak


def test_the_stub_and_the_reference_are_current():
    generator = load(ROOT / "docs" / "generate_api.py")
    fix = "run: python docs/generate_api.py"
    assert (PACKAGE / "__init__.pyi").read_text(encoding="utf-8") == generator.stub(), fix
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == generator.reference(), fix
    for name in ed.__all__:
        assert f"\n### {name}\n" in written


@pytest.mark.parametrize("name", ed.__all__)
def test_every_type_of_a_public_signature_is_public(name):
    assert missing_types(name, getattr(ed, name)) == {}


class Inner:
    """A type that is not public."""


class Outer:
    """A class whose signatures speak of it."""

    field: list[Inner]

    def method(self, one: Callable[[Inner], None] | None) -> "ed.Report":
        """Takes one."""

    @classmethod
    def made(cls) -> dict[str, Inner]:
        """Gives some."""
        return {}


def test_a_type_that_is_not_public_is_found():
    inner = f"{__name__}.Inner"
    found = missing_types("Outer", Outer)
    assert found == {"Outer.method(one)": [inner], "Outer.made(return)": [inner], "Outer.field": [inner]}


def test_registries_are_of_classes_that_fit_the_public_contracts():
    contracts = {"METHODS": ed.TokenReducer, "RUNTIMES": ed.Runner, "TARGETS": ed.Target}
    assert {name for name in ed.__all__ if isinstance(getattr(ed, name), Registry)} == {*contracts, "BACKBONES"}
    for name, contract in contracts.items():
        registry = getattr(ed, name)
        assert all(issubclass(registry.get(known), contract) for known in registry.own_names())
    wanted = {name for name in vars(ed.Backbone) if not name.startswith("_")}
    assert all(wanted <= set(dir(ed.BACKBONES.get(known))) for known in ed.BACKBONES.own_names())


def test_no_function_has_more_parameters_than_one_can_keep_in_mind():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {
            id(part): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and inside.get(id(node)) not in TIMM:
                count = parameters(node)
                found += [f"{path.relative_to(PACKAGE)}: {node.name} has {count}"] if count > MOST else []
    assert found == []


def test_at_most_eight_modules_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_paths_may_be_text(converted, checkpoint_file, tmp_path, monkeypatch):
    bundle, measure = str(converted.path), ed.ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    assert ed.read_bundle(bundle).manifest == converted.manifest
    assert ed.verify(bundle, runtimes=["onnxruntime"], against=str(checkpoint_file), batch_sizes=(1,)).passed
    assert ed.profile(bundle, runtimes=["onnxruntime"], measure=measure).rows
    place, _ = ed.package(bundle, "triton", out=str(tmp_path / "package"))
    assert place == tmp_path / "package"
    checkpoint = ed.read_checkpoint(str(checkpoint_file))
    assert ed.build_model(checkpoint).training is False
    assert ed.load_recipe(str(ROOT / "recipes" / "digits.yaml")).name == "digits"
    monkeypatch.chdir(tmp_path)
    made, report = ed.convert(str(checkpoint_file), keep_rate=0.5, out="made", measure=measure)
    assert report.passed
    assert made.path == Path("made")
    with pytest.raises(ed.InputError, match="no such file"):
        ed.build_engine(str(tmp_path / "gone.onnx"), str(tmp_path / "engine.plan"), "tensorrt-rtx", "fp16",
                        ed.BuildOptions(gpus=("sm80",)))  # fmt: skip


def test_training_writes_where_text_says(tmp_path):
    sections = ("dense.steps=1", "finetune.steps=1", "expect={}", "profile.duration=0.01", "profile.batch_sizes=[1]")
    recipe = ed.load_recipe("digits", [*sections, "compare.untrained=false", "compare.baselines=[]"])
    result = ed.train(recipe, str(tmp_path / "trained"), device="cpu")
    assert result.checkpoint == tmp_path / "trained" / "evit.safetensors"
    assert result.checkpoint.is_file()
    bundle, _ = ed.run(recipe, str(tmp_path / "run"))
    assert bundle.path == tmp_path / "run" / "bundle"


def test_the_architecture_page_has_every_room_on_its_floor():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    written = {room: int(floor) for floor, room in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = [one["layers"] for one in settings["tool"]["importlinter"]["contracts"] if one["type"] == "layers"]
    floors = {room: floor for floor, row in enumerate(reversed(layers), 1) for room in row.split(" | ")}
    assert written == floors
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert written.keys() == rooms - {"__init__"}
