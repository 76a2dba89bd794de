"""ToMe on the command line: its own flags and ``--method-option``, and a bundle of merged tokens."""

import numpy as np

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.cli.convert import command as convert
from evit_deploy.cli.options import tokens_of
from evit_deploy.pipeline.convert import convert as convert_checkpoint
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.registry import METHODS
from evit_deploy.tokens.plan import TokenSpec
from tests.support.command_line import QUICK, context_of


def asked(*arguments: str) -> dict:
    with context_of(["model.pth", *arguments]) as context:
        return tokens_of(dict(context.params))


def test_flags_of_tome():
    assert asked("--method", "tome", "--merge", "13") == {"method": "tome", "method_options": {"merge": 13}}
    listed = asked("--method", "tome", "--merge", "16,16,8", "--no-proportional-attention")
    assert listed["method_options"] == {"merge": (16, 16, 8), "proportional_attention": False}
    assert asked("--merge", "2", "--proportional-attention")["method_options"]["proportional_attention"] is True
    given = asked("--method-option", "merge=[4, 0]", "--method-option", "inflect=-0.5")
    assert given == {"method_options": {"merge": [4, 0], "inflect": -0.5}}
    assert "method_options" not in asked("--keep-rate", "0.7")


def test_methods_that_only_compare_are_not_offered():
    option = next(option for option in convert.params if "--method" in option.opts)
    assert isinstance(option.help, str)
    for name in METHODS.own_names():
        assert (name in option.help) == (name not in ("slice", "random", "inverse"))
    assert METHODS.offered() == [name for name in METHODS.names() if not METHODS.get(name).comparison_only]


def test_a_bundle_of_merged_tokens_passes_its_own_checks(cli, checkpoint):
    out = checkpoint.with_name("merged")
    arguments = ("--method", "tome", "--merge", "3", "--target", "onnx", "--target", "openvino", "--with-indices")
    made = cli("convert", checkpoint, *arguments, "--out", out, *QUICK)
    assert made.code == 0, made.err
    assert "--set tokens.method=tome" in made.err
    assert "--set tokens.options.merge=3" in made.err
    manifest = read_bundle(out).manifest
    assert manifest.tokens == TokenSpec(method="tome", options={"merge": 3}, fuse=False)
    assert [(row.choice, row.tokens_in - row.tokens_out) for row in manifest.plan.locations] == [("merge", 3)] * 2
    assert {output.name: output.shape for output in manifest.outputs}["kept_1"] == (None, 13 + 3)
    verified = cli("verify", out, *QUICK)
    assert verified.code == 0, verified.err
    assert "openvino" in verified.out


def test_python_takes_the_same_options(checkpoint):
    look = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, report = convert_checkpoint(
        checkpoint, method="tome", method_options={"merge": [2, 1]}, options=ConvertOptions(targets=("onnx",)),
        measure=look,
    )  # fmt: skip
    assert report.passed
    assert bundle.path.name.endswith("-tome-r2-1")
    np.testing.assert_array_equal([row.tokens_out for row in bundle.manifest.plan.blocks], [15, 14])
