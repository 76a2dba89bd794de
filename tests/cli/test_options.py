"""Options are spelled once: flags, recipes and Python name the same fields, and enums list their values."""

import json
import re
import subprocess
import sys

import click
import msgspec
import pytest
from click.testing import CliRunner

from evit_deploy.cli import cli
from evit_deploy.cli.compare import command as compare
from evit_deploy.cli.convert import command as convert
from evit_deploy.cli.options import _FLAGS, struct_of
from evit_deploy.cli.package import command as package
from evit_deploy.cli.profile import command as profile
from evit_deploy.recipe.fields import choices_in, field_docs, limits_in, plain
from evit_deploy.recipe.options import (
    BuildOptions,
    CompareOptions,
    ConvertOptions,
    ConvertSection,
    PreprocessOptions,
    ProfileOptions,
    ProfileSection,
)
from evit_deploy.recipe.recipe import load_comparison, load_recipe
from evit_deploy.registry import METHODS, RUNTIMES, TARGETS
from evit_deploy.serving.options import PackageOptions, TritonOptions
from tests.support.command_line import context_of
from tests.support.paths import RECIPES

STRUCTS = [
    (convert, ConvertOptions),
    (convert, BuildOptions),
    (profile, ProfileOptions),
    (compare, CompareOptions),
    (package, PackageOptions),
    (package, TritonOptions),
    (convert, PreprocessOptions),
]
VALUES = {  # as they are given on the command line, and what comes of it
    "batches": (["1:4:8", "2"], ((1, 4, 8), (2, 2, 2))),
    "gpus": (["SM80,sm86", "sm89"], ("sm80", "sm86", "sm89")),
    "workspace": (["64"], 64),
    "optimization_level": (["0"], 0),
    "version_compatible": (None, True),
    "hardware_compatible": (None, True),
    "timing_cache": (["cache"], "cache"),
    "plugin": (["auto"], "auto"),
    "targets": (["onnx", "openvino"], ("onnx", "openvino")),
    "precision": (["bf16"], "bf16"),
    "linear": (["matmul"], "matmul"),
    "calibration": (["images"], "images"),
    "keep_precision": (["blocks.11.mlp.*,head", "blocks.0.*"], ("blocks.11.mlp.*", "head", "blocks.0.*")),
    "max_drop": (["0.5"], 0.5),
    "sensitivity": (None, True),
    "indices": (None, True),
    "normalize": (None, True),
    "data": (["labeled"], "labeled"),
    "min_speedup": (["1.25"], 1.25),
    "sign": (["key.pem"], "key.pem"),
    "target_options": (["text.word=tokens", "text.size=3"], {"text": {"word": "tokens", "size": "3"}}),
}


PREPROCESS = {
    "mean": (["0.5,0.4,-0.1"], (0.5, 0.4, -0.1)),
    "std": (["0.5,0.4,0.1"], (0.5, 0.4, 0.1)),
    "crop_pct": (["0.9"], 0.9),
    "crop_mode": (["squash"], "squash"),
    "interpolation": (["bilinear"], "bilinear"),
    "labels": (["names.txt"], "names.txt"),
}


def flag(field: str) -> str:
    return _FLAGS.get(field, "--" + field.replace("_", "-"))


@pytest.mark.parametrize(("command", "struct"), STRUCTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_is_an_option_with_its_own_documentation(command, struct):
    options = {name: option for option in command.params for name in option.opts}
    # Preprocessing is another struct; of precisions the command line takes several.
    for field in set(struct.__struct_fields__) - {"preprocess", "precision"}:
        help_text = re.sub(r"\s*One of .*?\.(?= |$)", "", options[flag(field)].help).split()
        assert help_text == field_docs(struct)[field].replace("``", "").split()


def test_preprocessing_and_labels_are_options_of_convert():
    assert set(PREPROCESS) == set(PreprocessOptions.__struct_fields__)
    arguments = [part for field, (given, _) in PREPROCESS.items() for part in (flag(field), given[0])]
    with context_of(["model.pth", *arguments]) as context:
        asked = struct_of("PreprocessOptions", dict(context.params))
    assert asked == PreprocessOptions(**{field: value for field, (_, value) in PREPROCESS.items()})


def test_what_the_command_line_can_ask_for_a_recipe_can_too_and_the_reverse():
    fields = set(ConvertOptions.__struct_fields__)
    assert set(VALUES) == fields - {"preprocess"}
    assert set(ConvertSection.__struct_fields__) - fields == {"calibration_images"}  # training images stand in
    arguments, overrides, wanted = [], [], {}
    for field, (given, value) in VALUES.items():
        arguments += [flag(field)] if given is None else [part for text in given for part in (flag(field), text)]
        overrides.append(f"convert.{field}={json.dumps(value)}")
        wanted[field] = value
    with context_of(["model.pth", *arguments]) as context:
        (precision,) = context.params["precisions"]  # several make several bundles
        asked = struct_of("ConvertOptions", dict(context.params), precision=precision)
    assert asked == ConvertOptions(**wanted)
    section = load_recipe(RECIPES / "digits.yaml", overrides).convert
    assert {field: getattr(section, field) for field in wanted} == wanted


def test_a_comparison_s_recipe_takes_what_its_command_takes():
    given = ["--runtime", "onnxruntime", "--runtime", "eager", "--threads", "2", "--batch-sizes", "1,4", "--duration",
             "7", "--data", "labeled", "--reference", "evit-0.5", "--own-preprocessing"]  # fmt: skip
    wanted = {"runtimes": ("onnxruntime", "eager"), "threads": 2, "batch_sizes": (1, 4), "duration": 7.0,
              "data": "labeled", "reference": "evit-0.5", "own_preprocessing": True}  # fmt: skip
    with compare.make_context("compare", ["a", "b", *given], parent=click.Context(cli)) as context:
        assert struct_of("CompareOptions", dict(context.params)) == CompareOptions(**wanted)
    overrides = [f"{field}={json.dumps(value)}" for field, value in wanted.items()]
    recipe = load_comparison(RECIPES / "compare.yaml", overrides)
    assert {field: getattr(recipe, field) for field in wanted} == wanted
    assert set(CompareOptions.__struct_fields__) == {*wanted, "images"}
    with compare.make_context("compare", ["a", "b", "--images", "x"], parent=click.Context(cli)) as context:
        assert struct_of("CompareOptions", dict(context.params)) == CompareOptions(images="x")


def test_what_is_not_given_is_the_default():
    with context_of(["model.pth"]) as context:
        assert struct_of("ConvertOptions", dict(context.params)) == ConvertOptions()
    assert ProfileSection().duration == 3.0
    assert ProfileOptions().duration == 10.0
    assert CompareOptions().duration == 30.0


def test_options_stand_under_headings():
    page = CliRunner().invoke(cli, ["convert", "--help"]).output
    headings = re.findall(r"^(\w[\w ]*):$", page, flags=re.M)
    wanted = [
        "Examples",
        "Model",
        "Preprocessing and labels",
        "Token reduction",
        "Target",
        "Engine",
        "Checks",
        "Output",
    ]
    assert headings == wanted
    engine = page[page.index("Engine:") : page.index("Checks:")]
    assert all(flag(field) in engine for field in BuildOptions.__struct_fields__)


@pytest.mark.parametrize(
    ("arguments", "names", "near"),
    [
        (["convert", "x.pth", "--target", "tensort"], TARGETS.names(), "tensorrt"),
        (["convert", "x.pth", "--precision", "fp15"], ["fp32", "fp16", "bf16", "int8", "fp8"], "fp16"),
        (["convert", "x.pth", "--method", "evti"], METHODS.offered(), "evit"),
        (["verify", "bundle", "--runtime", "onxruntime"], RUNTIMES.names(), "onnxruntime"),
        (["compare", "a", "b", "--runtime", "onxruntime"], RUNTIMES.names(), "onnxruntime"),
        (["package", "bundle", "--for", "tritn"], ["triton", "cpp"], "triton"),
        (["package", "bundle", "--for", "cpp", "--platform", "openvin"], ["tensorrt", "openvino"], "openvino"),
        (["package", "bundle", "--for", "triton", "--preprocess", "pyton"], ["python", "dali", "none"], "python"),
    ],
)
def test_an_unknown_value_of_an_enum_lists_the_choices(cli, arguments, names, near):
    cli(*arguments).refused(2, f"got '{arguments[-1]}'", *names, f"Did you mean '{near}'?")


def test_the_shell_completes_names():
    words = {"--target": "tensor", "--precision": "f", "--method": "ev"}
    for name, begun in words.items():
        option = next(option for option in convert.params if name in option.opts)
        with context_of(["x.pth"]) as context:
            found = {item.value for item in option.type.shell_complete(context, option, begun)}
        assert found
        assert all(value.startswith(begun) for value in found)


def test_annotations_are_read():
    kinds = {field.name: field.type for field in msgspec.structs.fields(ConvertOptions)}
    assert choices_in(kinds["precision"]) == ("fp32", "fp16", "bf16", "int8", "fp8")
    assert choices_in(kinds["targets"]) == ()
    assert plain(kinds["targets"]) == (str, True)
    assert plain(kinds["workspace"]) == (int, False)
    assert limits_in(kinds["optimization_level"]) == (0, 5)
    assert limits_in(kinds["workspace"]) == (1, 2**31 - 1)


def test_help_scans_no_other_packages():
    """Entry points are looked up when a name is used, not for the page that lists ours."""
    code = (
        "import importlib.metadata as m, sys; m.entry_points = None\n"
        "from evit_deploy.cli import invoke as run; sys.exit(run(['convert', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert isinstance(convert, click.Command)
