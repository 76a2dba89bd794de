"""What the command line refuses, and that no refusal leaves or changes anything."""

import json
import subprocess
import sys

import pytest
import torch

from evit_deploy.bundle.manifest import MANIFEST, MODEL
from tests.support.models import hollow, tree


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["--keep-rate", "0"], ["keep rate", "got 0.0", "(0, 1]"]),
        (["--keep-rate", "1.5"], ["keep rate", "got 1.5"]),
        (["--keep-rate", "-1"], ["keep rate", "got -1.0"]),
        (["--keep-rate", "nan"], ["keep rate", "got nan"]),
        (["--keep-rate", "inf"], ["keep rate", "got inf"]),
        (["--keep-rate", "abc"], ["--keep-rate", "'abc'", "numbers"]),
        (["--keep-rate", ""], ["--keep-rate", "numbers"]),
        (["--keep-rate", "0.5,"], ["--keep-rate", "numbers"]),
        ([], ["--keep-rate", "is needed"]),
        (["--keep-rate", "0.5", "--locations", "0,7"], ["location", "got 7", "0 to 1"]),
        (["--keep-rate", "0.5", "--locations", "1,0"], ["not strictly increasing", "got 1,0", "expected 0,1"]),
        (["--keep-rate", "0.5", "--locations", "1,1"], ["not strictly increasing", "got 1,1"]),
        (["--keep-rate", "0.5", "--locations", "-1,1"], ["location", "got -1"]),
        (["--keep-rate", "0.5", "--locations", "1.5"], ["--locations", "whole numbers"]),
        (["--keep-rate", "0.5", "--locations", ""], ["--locations", "whole numbers"]),
        (["--keep-rate", "0.5,0.6", "--locations", "1"], ["2 rates for 1 locations"]),
        (["--keep-rate", "0.5,0.6,0.7", "--locations", "0,1"], ["3 rates for 2 locations"]),
        (["--keep-rate", "0.5,0.6,0.7"], ["3 rates for 2 locations"]),
        (["--keep-rate", "0.5", "--image-size", "100"], ["--image-size", "got 100", "multiple of 16", "96 or 112"]),
        (["--keep-rate", "0.5", "--image-size", "0"], ["--image-size", "got 0"]),
        (["--keep-rate", "0.5", "--image-size", "-64"], ["--image-size", "got -64"]),
        (["--keep-rate", "0.5", "--image-size", "big"], ["--image-size", "got big"]),
        (["--keep-rate", "0.5", "--model", "deit_tiny_patch16_223"], ["--model", "deit_tiny_patch16_224"]),
        (
            ["--keep-rate", "0.5", "--model", "deit_tiny_patch16_224"],
            ["smallest.safetensors", "not those of deit_tiny"],
        ),
        (["--keep-rate", "0.5", "--target", "tensort"], ["--target", "'tensort'", "onnx"]),
        (["--keep-rate", "0.5", "--precision", "fp17"], ["--precision", "'fp17'", "fp32"]),
        (["--keep-rate", "0.5", "--method", "evti"], ["got 'evti'", "Did you mean 'evit'?"]),
        (["--keep-rate", "0.5", "--method", "random"], ["'random' exists only for comparison", "compare.baselines"]),
        (["--method", "tome"], ["'tome' needs the option 'merge'", "--merge 13"]),
        (["--method", "tome", "--merge", "2", "--keep-rate", "0.5"], ["takes no keep rate", "--merge"]),
        (["--method", "tome", "--merge", "2", "--locations", "1"], ["takes no locations"]),
        (["--method", "tome", "--merge", "2", "--fuse"], ["'tome' has no fused token"]),
        (["--method", "tome", "--merge", "9"], ["to merge in one block", "at most 8"]),
        (["--method", "tome", "--merge", "8,8"], ["too many tokens to merge in block 1", "at most 4"]),
        (["--method", "tome", "--merge", "2,2,2"], ["more numbers than blocks", "at most 2"]),
        (["--method", "tome", "--merge", "-1"], ["--merge", "from 0 up"]),
        (["--method", "tome", "--merge", "2", "--method-option", "merge=3"], ["merge is given twice"]),
        (["--method", "tome", "--method-option", "merge=many"], ["$.merge", "got `str`"]),
        (["--method", "tome", "--merge", "2", "--method-option", "ratio=3"], ["ratio", "merge, inflect"]),
        (["--merge", "13"], ["'evit' does not take these options", "an option of the method 'tome'"]),
        (["--keep-rate", "0.5", "--no-proportional-attention"], ["an option of the method 'merge' and 'tome'"]),
        (["--keep-rate", "0.5", "--threads", "0"], ["--threads", "0"]),
        (["--keep-rate", "0.5", "--min-speedup", "fast"], ["--min-speedup", "'fast'"]),
        (["--keep-rate", "0.5", "--data", "absent"], ["absent", "no such folder"]),
        (["--keep-rate", "0.5", "--out", "{user}"], ["exists already", "--force"]),
        (["--keep-rate", "0.5", "--out", "{user}", "--force"], ["do not belong to a bundle", "smallest.safetensors"]),
        (["--keep-rate", "0.5", "--out", "{user}/smallest.safetensors", "--force"], ["do not belong to a bundle"]),
        (["--keep-rate", "0.5", "--out", "{user}/smallest.safetensors/x"], ["parent is not a folder"]),
        (["--keep-rate", "0.5", "--out", "/proc/bundle"], ["cannot write there", "/proc"]),
        (["--keep-rate", "0.5", "--out", "/sys/a/b/bundle"], ["cannot write there", "/sys"]),
        (["--keep-rate", "0.5", "--out", "{user}/" + "x" * 300], ["cannot write there"]),
    ],
    ids=lambda value: " ".join(value)[:60] if value and value[0].startswith("--") else "",
)
def test_convert_refuses(cli, checkpoint, arguments, hints):
    before = tree(checkpoint.parent)
    arguments = [argument.replace("{user}", str(checkpoint.parent)) for argument in arguments]
    cli("convert", checkpoint, *arguments).refused(2, *hints)
    assert tree(checkpoint.parent) == before


def test_refusals_do_not_load_what_they_do_not_need(checkpoint):
    program = (
        "import sys; from evit_deploy.cli import invoke as run; "
        "code = run(['convert', 'x.pth', '--keep-rate', '7']); sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("absent.pth", None, "no such file"),
        ("empty.pth", b"", "empty"),
        ("text.pth", b"<html>404</html>", "torch.save"),
        ("picture.pth", b"\x89PNG\r\n\x1a\n" + bytes(64), "torch.save"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("cut.pth", b"PK\x03\x04cut", "damaged"),
        ("deit_tiny_patch16_225", None, "deit_tiny_patch16_224"),
        ("my model", None, "Check the path."),
    ],
)
def test_checkpoints_that_are_none(cli, tmp_path, monkeypatch, name, content, hint):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = tree(tmp_path)
    for arguments in (["convert", name], ["profile", name]):
        cli(*arguments, "--keep-rate", "0.5").refused(2, name, hint)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "fix"),
    [("70", "for 70 % give 0.7."), ("0", "for example 0.7."), ("0,7", "for example 0.7."), ("700", "for example 0.7.")],
)
def test_keep_rates_out_of_range(cli, checkpoint, given, fix):
    before = tree(checkpoint.parent)
    cli("convert", checkpoint, "--keep-rate", given).refused(2, "out of range", fix)
    assert tree(checkpoint.parent) == before


def test_a_checkpoint_of_another_family(cli, tmp_path):
    torch.save({"model": {"layer1.0.conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
    cli("convert", tmp_path / "resnet.pth", "--keep-rate", "0.5").refused(2, "resnet.pth", "ResNet")
    torch.save(hollow("deit_tiny_patch16_224") | {"head.bias": torch.zeros(7)}, tmp_path / "deit.pth")
    cli("convert", tmp_path / "deit.pth", "--keep-rate", "0.5").refused(2, "deit.pth", "head.bias [7]")


def test_errors_as_json(cli, checkpoint):
    for arguments in (["--keep-rate", "7"], ["--keep-rate", "abc"], []):
        result = cli("convert", checkpoint, "--json", *arguments)
        assert result.code == 2
        error = result.document["error"]
        assert error["exit_code"] == 2
        assert f"evit-deploy: {error['message']}" == result.err.splitlines()[-1]


def test_debug_shows_the_traceback(cli, checkpoint):
    result = cli("convert", checkpoint, "--keep-rate", "7", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err


def test_verify_and_profile_refuse(cli, bundle, tmp_path):
    before = tree(bundle.parent)
    for name in ("verify", "profile"):
        cli(name, bundle, "--runtime", "onnxrutime").refused(2, "got 'onnxrutime'", "Did you mean 'onnxruntime'?")
        cli(name, bundle, "--batch-sizes", "0").refused(2, "--batch-sizes", "from 1 to 65536")
        cli(name, bundle, "--batch-sizes", "a").refused(2, "--batch-sizes", "whole numbers")
        cli(name, tmp_path / "user").refused(2, "not a bundle")
    cli("verify", bundle, "--against", bundle / MANIFEST).refused(2, "--against", "not the checkpoint")
    cli("verify", tmp_path / "absent").refused(2, "no such bundle")
    cli("profile", bundle, "--duration", "0").refused(2, "--duration")
    cli("profile", bundle / MODEL, "--min-speedup", "1.1", "--duration", "0.01", "--batch-sizes", "1").refused(
        2, "no dense twin"
    )
    assert tree(bundle.parent) == before
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    (bundle / MANIFEST).write_text(json.dumps(manifest | {"files": {"../smallest.safetensors": "0"}}))
    cli("verify", bundle).refused(2, "outside the bundle")
    (bundle / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    cli("verify", bundle).refused(2, "another version")
    (bundle / MANIFEST).write_text("{")
    cli("verify", bundle).refused(2, "not valid JSON")


def test_a_timm_name_without_network(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = cli("convert", "deit_tiny_patch16_224", "--keep-rate", "0.7")
    result.refused(3, "'deit_tiny_patch16_224' are not in the hub's cache", "give its path")
    assert [name for name in tree(tmp_path) if not name.startswith("cache")] == []


@pytest.mark.parametrize("value", ["nan", "0", "-1", "inf", "fast"])
@pytest.mark.parametrize(
    "arguments",
    [("convert", "x.pth", "--min-speedup"), ("profile", "x", "--min-speedup"), ("profile", "x", "--duration")],
)
def test_what_has_to_be_above_zero(cli, arguments, value):
    result = cli(*arguments, value)
    assert result.code == 2
    assert f"got '{value}', expected a number above 0" in result.err
