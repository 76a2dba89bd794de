"""What the documentation says is what the program does: every block is run, every link leads somewhere."""

import ast
import contextlib
import doctest
import importlib.util
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import timm
import torch

import evit_deploy
from evit_deploy import BACKBONES, METHODS, RUNTIMES, TARGETS, ConvertOptions, ProfileOptions
from evit_deploy.cli import COMMANDS
from evit_deploy.data.images import sample_photographs
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("[!.]*/README.md"))]
PAGES += [ROOT / "plugins" / "example" / "README.md"]
# Training for real takes minutes; the same stages on fewer steps do not. Accuracy gates go with them.
OVERRIDES = ("dense.steps=2", "finetune.steps=2", "expect={}", "profile.duration=0.1", "profile.batch_sizes=[1]")
SHORT = " ".join(f"--set {override}" for override in OVERRIDES)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands_of_readme() -> list[str]:
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("evit-deploy")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would stand: the recipes, and a checkpoint of their own (a small one)."""
    path = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", path / "recipes")
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("deit_tiny_patch16_224").state_dict()}, path / "deit_s.pth")
    sample_photographs()[0].save(path / "photograph.jpg")
    return path


def test_readme_begins_with_the_two_commands():
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    assert 'pip install -e ".[dev]" && evit-deploy run recipes/digits.yaml' in first_screen
    assert 'pip install -e ".[dev]" && pytest' in first_screen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_of_the_readme_runs(folder: Path):
    commands = commands_of_readme()
    assert {command.split()[1] for command in commands} >= {"run", "convert", "verify", "profile", "predict", "doctor"}
    for command in commands:
        arguments = shlex.split(command.replace("digits.yaml", f"digits.yaml {SHORT}"))[1:]
        if arguments[0] == "profile":
            arguments += ["--duration", "0.1"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-m", "evit_deploy", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    assert (folder / "deit_s-evit-k0.7" / "model.onnx").is_file()
    assert (folder / "runs" / "digits" / "bundle" / "manifest.json").is_file()


@pytest.fixture
def run_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Runs a block as a module that can be imported; what it registers is gone after the test."""
    for registry in (METHODS, BACKBONES, TARGETS, RUNTIMES):
        monkeypatch.setattr(registry, "_targets", {name: registry._targets[name] for name in registry.names()})

    numbers = itertools.count()

    def run(block: str, page: str) -> None:
        module = types.ModuleType(f"documented_example_{next(numbers)}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(block, page, "exec"), module.__dict__)

    return run


@pytest.mark.filterwarnings("ignore:Overwriting cosine_vit")
@pytest.mark.parametrize(
    ("page", "package"),
    [
        pytest.param("README.md", None, id="README.md"),
        pytest.param("docs/data.md", "skimage", id="data.md"),
        pytest.param("docs/seeing.md", None, id="seeing.md"),
        pytest.param("docs/extending.md", None, id="extending.md"),
        pytest.param("docs/engines.md", "openvino", id="engines.md", marks=pytest.mark.openvino),
    ],
)
def test_python_blocks_run(page: str, package: str | None, run_block):
    if package is not None:
        pytest.importorskip(package)
    found = blocks(ROOT / page, "python")
    assert found
    for block in found:
        run_block(block, page)


def cells(page: Path) -> list[tuple[str, str | None]]:
    """A notebook-style page's blocks of Python, each with what the page says that it shows."""
    fences = re.findall(r"^```(python|text)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    following = [*fences[1:], ("", "")]
    return [
        (code, shown if kind == "text" else None)
        for (language, code), (kind, shown) in zip(fences, following, strict=True)
        if language == "python"
    ]


def shown_by(code: str, names: dict[str, object]) -> str:
    """Runs a cell and gives what a notebook would show below it: what it prints, and the value of its last line."""
    tree, printed = ast.parse(code), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "python.md", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "python.md", "eval"), names) if last is not None else None
    return printed.getvalue() + ("" if value is None else f"{value!r}\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_walk_through_in_python_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found, names = cells(ROOT / "docs" / "python.md"), {"__name__": "__main__"}
    assert len(found) > 12
    differing = []
    for code, wanted in found:
        got = shown_by(code, names)
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not doctest.OutputChecker().check_output(wanted or "", got, options):
            differing.append(f"{code}\nshows\n{got}\ninstead of\n{wanted}")
    assert differing == []


def test_the_documented_method_works(run_block):
    """docs/extending.md's method reduces tokens and keeps those with the largest norm."""
    (block,) = [block for block in blocks(ROOT / "docs" / "extending.md", "python") if "METHODS.register" in block]
    run_block(block, "extending.md")
    model = timm.create_model("test_vit")
    evit_deploy.reduce_tokens_(model, evit_deploy.TokenSpec(keep_rate=0.5, method="loudest"))
    reducer = model.blocks[1].reducer
    x = torch.randn(2, reducer.plan.tokens_in, 64)
    _, kept = reducer(x, x, x)
    loudest = x[:, 1:].norm(dim=-1).topk(reducer.plan.keep).indices
    assert torch.equal(kept.long().sort().values, loudest.sort().values)


@pytest.mark.filterwarnings("ignore:Overwriting cosine_vit")
def test_the_documented_backbone_and_runtime_work(run_block, tmp_path: Path):
    """docs/extending.md's family goes from a checkpoint to a bundle, which its runtime proves."""
    found = blocks(ROOT / "docs" / "extending.md", "python")
    (backbone,) = [block for block in found if "BACKBONES.register" in block]
    (runtime,) = [block for block in found if 'RUNTIMES.register("onnx-reference"' in block]
    run_block(backbone, "extending.md")
    torch.manual_seed(0)  # or the weights depend on the tests that ran before
    model = timm.create_model("cosine_vit")
    assert model(torch.randn(2, 3, 64, 64)).abs().max() <= 10
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, _ = evit_deploy.convert(
        tmp_path / "weights.pth", model="cosine_vit", keep_rate=0.6, measure=measure, out=tmp_path / "bundle"
    )
    run_block(runtime, "extending.md")
    report = evit_deploy.verify(bundle.path, runtimes=["onnx-reference"], batch_sizes=(1, 2))
    assert report.passed
    assert any(check.name.startswith("onnx-reference, batch 2") for check in report.checks)


@pytest.mark.parametrize("fuse", [True, False])
def test_the_documented_target_works(fuse: bool, run_block, checkpoint_file: Path, tmp_path: Path):
    """docs/extending.md's target is made, proven by its runtime and timed beside its dense twin."""
    (block,) = [block for block in blocks(ROOT / "docs" / "extending.md", "python") if "TARGETS.register" in block]
    run_block(block, "extending.md")
    name = "onnxruntime-optimized"
    options = ConvertOptions(targets=(name,), target_options={name: {"fuse": fuse}})
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, report = evit_deploy.convert(
        checkpoint_file, keep_rate=0.6, options=options, measure=measure, out=tmp_path / "bundle"
    )
    assert {"optimized.onnx", "dense/optimized.onnx"} <= set(bundle.manifest.files)
    assert any(check.name.startswith(f"{name}, batch 1") for check in report.checks)
    assert {row.variant for row in report.rows if row.runtime == name} == {"model", "dense"}
    nodes = onnx.load(bundle.file("optimized.onnx")).graph.node
    assert "TokenReorg" not in {node.op_type for node in nodes}
    assert any(node.op_type == "SkipLayerNormalization" for node in nodes) is fuse


def test_the_command_reference_is_current():
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == generator.reference(), "run: python docs/generate_cli.py"
    for name in COMMANDS:
        assert f"\n## {name}\n" in written


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def test_public_names_are_documented_and_importable():
    for name in evit_deploy.__all__:
        assert getattr(evit_deploy, name).__doc__, name
