"""Hostile files through the commands: an exit code of the contract and one sentence, whatever they hold."""

import json
import os
import shutil
from pathlib import Path

import hypothesis
import pytest

from evit_deploy.bundle.manifest import GOLDEN, MANIFEST, MODEL
from evit_deploy.files import sha256
from tests.fuzz.formats import FORMATS
from tests.fuzz.seeds import bundle
from tests.support.command_line import Result

pytestmark = pytest.mark.slow
INPUTS = int(os.environ.get("EVIT_FUZZ_COMMANDS", "12"))
few = hypothesis.settings(max_examples=INPUTS, phases=[hypothesis.Phase.generate],
                          suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip


def check(result: Result) -> None:
    """0, or a code of the contract with one sentence that is not about a mistake of ours."""
    assert result.code in (0, 1, 2, 3, 4), result.err
    assert "Traceback" not in result.err
    assert "unexpected" not in result.err
    if result.code:
        last = result.err.splitlines()[-1]
        assert last.startswith("evit-deploy: ")
        assert len(last) <= 2000


@pytest.mark.parametrize("name", ["checkpoint", "safetensors"])
def test_convert(cli, tmp_path, name):
    form = FORMATS[name]

    @few
    @hypothesis.given(form.inputs())
    def one(content: bytes) -> None:
        (tmp_path / form.file).write_bytes(content)
        check(cli("convert", tmp_path / form.file, "--keep-rate", "0.6", "--out", tmp_path / "out", "--force"))

    one()
    assert {path.name for path in tmp_path.iterdir()} <= {form.file, "out", "out.rejected"}


@pytest.mark.parametrize("file", [MANIFEST, GOLDEN, MODEL])
@pytest.mark.parametrize("command", ["verify", "package"])
def test_bundles(cli, tmp_path, command, file):
    form = FORMATS[{MANIFEST: "manifest", GOLDEN: "golden", MODEL: "onnx"}[file]]
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(), folder)
    right = json.loads((folder / MANIFEST).read_text())
    more = ("--out", tmp_path / "out", "--force") if command == "package" else ()

    @few
    @hypothesis.given(form.inputs())
    def one(content: bytes) -> None:
        (folder / file).write_bytes(content)
        if file != MANIFEST:  # whoever changes a file can change its hash as well
            files = right["files"] | {file: sha256(folder / file)}
            (folder / MANIFEST).write_text(json.dumps(right | {"files": files}))
        check(cli(command, folder, *more))

    one()


def test_predict(cli, tmp_path):
    @few
    @hypothesis.given(FORMATS["image"].inputs())
    def one(content: bytes) -> None:
        (tmp_path / "image.png").write_bytes(content)
        check(cli("predict", bundle(), tmp_path / "image.png"))

    one()
    assert [path.name for path in Path(tmp_path).iterdir()] == ["image.png"]
