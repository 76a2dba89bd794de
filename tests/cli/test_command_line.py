"""The command line as a user meets it: results, refusals, exit codes, interruptions, and what is left on disk."""

import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.bundle.manifest import MODEL
from evit_deploy.cli import COMMANDS
from evit_deploy.report.report import Report
from tests.support.command_line import QUICK, command, interrupted
from tests.support.machines import pretend
from tests.support.models import SMALLEST, tree

# Help.

_HEAVY = ("torch", "timm", "numpy", "onnx", "onnxruntime", "rich", "sklearn", "PIL", "safetensors", "yaml")
_HELP = """
import json, sys
from evit_deploy.cli import invoke as run
code = run(sys.argv[2:])
print(json.dumps([code, [name for name in json.loads(sys.argv[1]) if name in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize("name", ["", *COMMANDS, "plugin build", "plugin check"])
def test_help_is_quick_to_load(name):
    arguments = [*name.split(), "--help"]
    done = subprocess.run(
        [sys.executable, "-c", _HELP, json.dumps(_HEAVY), *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stderr) == [0, []]
    assert done.stdout.startswith("Usage: ")
    if name:
        assert f"  evit-deploy {name}" in done.stdout  # an example
        assert "--json" in done.stdout or "Commands:" in done.stdout
    else:
        assert all(f"  {command} " in done.stdout for command in COMMANDS)
        assert "Exit codes: 0 ok" in done.stdout


def test_the_heavy_modules_are_the_real_ones():
    for name in _HEAVY:
        importlib.import_module(name)  # a misspelt name would never be found among the loaded ones


def test_version(cli):
    import evit_deploy

    result = cli("--version")
    assert (result.code, result.out) == (0, evit_deploy.__version__ + "\n")


def test_an_unknown_command_has_a_near_name(cli):
    cli("convrt").refused(2, "no command 'convrt'", "Did you mean 'convert'?")
    cli("xyz").refused(2, "There are: convert")
    cli("convert", "--kep-rate", "0.7").refused(2, "--kep-rate", "--keep-rate")
    cli("convert").refused(2, "CHECKPOINT")


# convert, verify, profile as a user runs them.


def test_convert(made):
    path, result = made
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == str(path)
    assert "tokens in" in result.out  # the plan
    assert "onnxruntime, batch 1, 2, 8: kept patches" in result.out
    assert result.out.startswith("Same answers as the PyTorch model to 8 images on onnxruntime; ")
    assert "speed-up" in result.out
    stages = ["reading the checkpoint", "exporting to ONNX", "exporting the dense twin", "asking PyTorch",
              "verifying", "profiling batch 1", "writing the bundle"]  # fmt: skip
    lines = result.err.splitlines()
    places = [next(i for i, line in enumerate(lines) if f"] {stage}" in line) for stage in stages]
    assert places == sorted(places)
    assert not any(stage in result.out for stage in stages)
    assert "never trained with token reduction. To fine-tune: evit-deploy train" in result.err
    bundle = read_bundle(path)
    assert bundle.manifest.tokens.keep_rate == 0.6
    assert bundle.manifest.model_args == SMALLEST[1]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["smallest-evit-k0.6", "smallest.safetensors"]


def test_verify_a_moved_bundle(bundle):
    result = command("verify", bundle, *QUICK)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"verified: {bundle}"
    assert result.err == ""
    assert "eager, batch 1, 2, 8: logits" in result.out
    assert result.out.startswith("Same answers as the PyTorch model to 8 images on eager")


def test_profile_a_bundle(cli, made):
    result = cli("profile", made[0], "--batch-sizes", "1,2", "--duration", "0.01", "-v", *QUICK)
    assert result.code == 0
    assert result.err.splitlines() == ["reading the models", "[1/2] profiling batch 1", "[2/2] profiling batch 2"]
    for word in ("slice", "dense", "speed-up", "overhead", "images/s"):
        assert word in result.out


def test_json_is_one_document_a_command(cli, made, checkpoint):
    short = ("--batch-sizes", "1", "--duration", "0.01", "--json", *QUICK)
    document = cli("verify", made[0], "--json", *QUICK).document
    assert document["passed"] is True
    assert len(document["checks"]) > 10
    document = cli("profile", made[0], *short).document
    assert {row["variant"] for row in document["rows"]} == {"model", "dense", "slice"}
    document = cli("profile", checkpoint, "--keep-rate", "0.5", *short).document
    assert {row["runtime"] for row in document["rows"]} == {"eager"}
    document = cli("doctor", "--json").document
    assert document["usable"] is True
    result = cli("convert", checkpoint, "--keep-rate", "1,0.5", "--no-fuse", "--locations", "0,1", "--json", *QUICK)
    document = result.document
    assert result.code == 0
    assert document["bundle"] == str(checkpoint.with_name("smallest-evit-k1-0.5"))
    assert [block["keep"] for block in document["plan"]["blocks"]] == [None, 8]
    assert msgspec.convert(document, Report, strict=False).passed


def test_quiet_says_nothing_on_stderr(cli, checkpoint, tmp_path):
    arguments = ("--keep-rate", "0.5", "--with-indices", "--out", tmp_path / "out", "-q", *QUICK)
    result = cli("convert", checkpoint, *arguments)
    assert (result.code, result.err) == (0, "")
    outputs = read_bundle(tmp_path / "out").manifest.outputs
    assert [spec.name for spec in outputs] == ["logits", "kept_0", "kept_1"]
    # the same place again, now full: without --force nothing happens, with it the bundle is replaced
    before = tree(tmp_path)
    cli("convert", checkpoint, *arguments).refused(2, "exists already", "--force")
    assert tree(tmp_path) == before
    assert cli("convert", checkpoint, *arguments, "--force", "--keep-rate", "0.4").code == 0
    assert read_bundle(tmp_path / "out").manifest.tokens.keep_rate == 0.4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "user"]


def test_doctor(cli):
    result = cli("doctor")
    assert result.code == 0
    assert result.err == ""
    for group in ("Python and packages", "Extras", "GPU", "Plugin", "Runtimes", "Targets"):
        assert f"\n{group}\n" in f"\n{result.out}"
    assert "ok  onnxruntime" in result.out
    assert not re.search(r"\bNO\b", result.out)


# Gates.


def test_a_speedup_that_is_not_reached_leaves_the_evidence(cli, checkpoint):
    out = checkpoint.with_name("bundle")
    arguments = ("convert", checkpoint, "--keep-rate", "0.5", "--out", out, "--min-speedup", "100", *QUICK)
    rejected = out.with_name("bundle.rejected")
    cli(*arguments).refused(1, "speed-up", "expected 100", str(rejected))
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["bundle.rejected", checkpoint.name]
    report = msgspec.json.decode((rejected / "report.json").read_bytes(), type=Report)
    assert not report.passed
    assert {check.limit for check in report.failed} == {100}
    assert read_bundle(rejected).manifest.results["passed"] is False
    # once more, with something of the user's among the evidence: that stays
    (rejected / "thoughts.txt").write_text("mine")
    before = tree(checkpoint.parent)
    result = cli(*arguments, "--json")
    assert result.code == 1
    assert "evidence was not kept" in result.document["error"]["message"]
    assert tree(checkpoint.parent) == before


def test_a_gate_of_profile(cli, made):
    arguments = ("profile", made[0], "--min-speedup", "100", "--duration", "0.01", "--batch-sizes", "1", *QUICK)
    result = cli(*arguments)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert "expected 100" in result.err.splitlines()[-1]
    assert "speed-up" in result.out
    result = cli(*arguments, "--json")
    assert result.code == 1
    assert result.document["checks"][0]["passed"] is False


def test_verify_of_a_tampered_bundle(cli, bundle):
    content = bytearray((bundle / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / MODEL).write_bytes(content)
    result = cli("verify", bundle)
    assert result.code == 1
    assert result.out.splitlines()[-1] == f"NOT verified: {bundle}"
    assert "changed or gone: model.onnx" in result.err
    assert "Traceback" not in result.err
    result = cli("verify", bundle, "--json")
    assert (result.code, result.document["passed"]) == (1, False)


# A full disk, and interruptions.


def test_a_full_disk(cli, checkpoint, small_disk):
    result = cli("convert", checkpoint, "--keep-rate", "0.5", "--out", small_disk / "a" / "bundle", *QUICK)
    result.refused(4, "No space left", "Nothing was left behind")
    assert tree(small_disk) == {}


def test_a_file_size_limit(cli, checkpoint):
    before = tree(checkpoint.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        result = cli("convert", checkpoint, "--keep-rate", "0.5", *QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    result.refused(4, "File too large", "Nothing was left behind")
    assert tree(checkpoint.parent) == before


@pytest.mark.slow
def test_an_interruption_leaves_nothing(tmp_path, smallest):
    stages = [
        ("exporting to ONNX", signal.SIGINT, []),
        ("verifying", signal.SIGINT, ["--json"]),
        ("profiling", signal.SIGTERM, []),
    ]
    checkpoints = []
    for i in range(len(stages)):
        (tmp_path / str(i)).mkdir()
        checkpoints.append(Path(shutil.copy(smallest, tmp_path / str(i))))
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda job: interrupted(job[0], *job[1]), zip(checkpoints, stages, strict=True)))
    for result, checkpoint, (stage, number, more) in zip(results, checkpoints, stages, strict=True):
        assert result.code == 128 + number, result.err
        assert any(f"] {stage}" in line for line in result.err.splitlines())
        assert result.err.splitlines()[-1] == "evit-deploy: interrupted; nothing was left half-written"
        assert "Traceback" not in result.err
        assert list(checkpoint.parent.iterdir()) == [checkpoint], stage
        if more:
            assert result.document["error"]["exit_code"] == 128 + number
        else:
            assert result.out == ""


def test_torchvision_that_was_built_for_another_pytorch(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    pretend(broken, "torchvision", None, "raise RuntimeError('operator torchvision::nms does not exist')")
    line = [sys.executable, "-m", "evit_deploy", "convert", checkpoint, "--keep-rate", "0.7"]
    paths = os.pathsep.join([str(broken), *(path for path in sys.path if path)])
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "torchvision was built for another PyTorch" in done.stderr
    assert "pip install --force-reinstall torch torchvision" in done.stderr
    assert "Traceback" not in done.stderr
