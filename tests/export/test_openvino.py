"""OpenVINO: the files we write, files of others, damaged files, and inputs that do not fit."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from evit_deploy.bundle.manifest import OPENVINO
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.export.card import INPUT, read_card
from evit_deploy.export.openvino import openvino_card, read_openvino, save_openvino
from evit_deploy.runtimes.openvino import OpenVINORunner
from tests.support.command_line import QUICK
from tests.support.exports import exported
from tests.support.openvino_model import NEEDS_OPENVINO

pytestmark = NEEDS_OPENVINO


# The file.


def test_the_file_says_what_it_is(ir):
    assert openvino_card(read_openvino(ir)) == read_card(exported("plain"))


def test_the_same_model_gives_the_same_bytes(ir, tmp_path):
    save_openvino(exported("plain"), tmp_path / "again" / "other.xml")
    assert (tmp_path / "again" / "other.xml").read_bytes() == ir.read_bytes()
    assert (tmp_path / "again" / "other.bin").read_bytes() == ir.with_suffix(".bin").read_bytes()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["other.bin", "other.xml"]


def test_weights_are_written_as_they_are(ir):
    weights = sum(len(tensor.raw_data) for tensor in exported("plain").graph.initializer if len(tensor.dims) > 1)
    assert ir.with_suffix(".bin").stat().st_size >= weights


def test_a_full_disk_leaves_nothing(small_disk):
    with pytest.raises(StageError):
        save_openvino(exported("plain"), small_disk / "model.xml")
    assert list(small_disk.iterdir()) == []


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"named \.xml"):
        save_openvino(exported("plain"), tmp_path / "model.bin")
    with pytest.raises(InputError, match="did not write this file"):
        save_openvino(foreign(), tmp_path / "model.xml")
    with pytest.raises(InputError, match="no such file"):
        save_openvino(tmp_path / "none.onnx", tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_whose_weights_are_gone(cli, checkpoint):
    out = checkpoint.with_name("bundle")
    made = cli("convert", checkpoint, "--keep-rate", "0.5", "--target", "openvino", "--out", out, *QUICK)
    assert made.code == 0, made.err
    (out / OPENVINO).with_suffix(".bin").unlink()
    for more in ([], ["--runtime", "openvino"]):
        result = cli("verify", out, *more, *QUICK)
        assert result.code == 1
        assert "Traceback" not in result.err
        assert "changed or gone: openvino/model.bin. Copy the bundle here again" in result.err.splitlines()[-1]
    cli("profile", out, *QUICK).refused(2, "openvino/model.bin", "not what the manifest says", "Convert again")


# What is not ours, and what is no model.


def foreign(operator: str = "Relu", domain: str = "") -> ModelProto:
    node = helper.make_node(operator, ["a"], ["b"], domain=domain)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "ab"]
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(helper.make_graph([node], "foreign", ends[:1], ends[1:]), opset_imports=opsets)


def test_models_of_others_run_in_fp32(tmp_path):
    import openvino

    openvino.save_model(openvino.Core().read_model(foreign().SerializeToString()), tmp_path / "other.xml")
    for artifact in (foreign(), tmp_path / "other.xml"):
        with OpenVINORunner(artifact, with_indices=True) as runner:
            assert runner.computes_in == "f32"
            assert runner.card is None
            answers = runner.infer({"a": np.array([[-1, 0, 2]], np.float32)})
        assert list(answers) == ["b"]
        np.testing.assert_array_equal(answers["b"], [[0, 0, 2]])


def test_operators_that_openvino_does_not_know():
    with (
        pytest.raises(StageError, match=r"OpenVINO cannot read the model: .*No conversion rule.*NoSuch") as error,
        OpenVINORunner(foreign("NoSuch", "other")),
    ):
        pass
    assert "\n" not in str(error.value)


def text(path: Path, ir: Path) -> None:
    path.write_text("a letter to a friend")
    path.with_suffix(".bin").write_bytes(b"")


def truncated_weights(path: Path, ir: Path) -> None:
    path.write_bytes(ir.read_bytes())
    path.with_suffix(".bin").write_bytes(ir.with_suffix(".bin").read_bytes()[:1000])


def truncated_network(path: Path, ir: Path) -> None:
    path.write_bytes(ir.read_bytes()[:20000])
    path.with_suffix(".bin").write_bytes(ir.with_suffix(".bin").read_bytes())


def another_encoding(path: Path, ir: Path) -> None:
    path.write_bytes(ir.read_bytes().replace(b"fp32", b"fp\xff2"))
    path.with_suffix(".bin").write_bytes(ir.with_suffix(".bin").read_bytes())


def no_weights(path: Path, ir: Path) -> None:
    path.write_bytes(ir.read_bytes())


def empty(path: Path, ir: Path) -> None:
    path.write_bytes(b"")
    path.with_suffix(".bin").write_bytes(b"")


def nothing(path: Path, ir: Path) -> None:
    pass


DAMAGES = [text, truncated_weights, truncated_network, another_encoding, no_weights, empty, nothing]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage, ir, tmp_path, capfd):
    damage(tmp_path / "model.xml", ir)
    with pytest.raises(InputError, match=str(tmp_path)) as error, OpenVINORunner(tmp_path / "model.xml"):
        pass
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"not the model's inputs \(got \[\], expected \['input'\]\)"),
        ({"image": np.zeros((1, 3, 96, 96), np.float32)}, "not the model's inputs"),
        ({INPUT: np.zeros((1, 1, 96, 96), np.float32)}, "incompatible"),
    ],
)
def test_inputs_that_do_not_fit(ir, feeds, message):
    with OpenVINORunner(ir) as runner, pytest.raises(StageError, match=message) as error:
        runner.infer(feeds)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("artifact", [torch.nn.Linear(1, 1), "engine.plan", Path("model.bin")])
def test_what_it_does_not_accept(artifact):
    assert OpenVINORunner.accepts(artifact)


# The package.


def test_its_makers_are_not_told():
    code = (
        "import sys; from evit_deploy.export.openvino import import_openvino\n"
        "import_openvino().Core(); print('openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(MissingRequirement, match=re.escape(install_line("openvino"))),
        OpenVINORunner(exported("plain")),
    ):
        pass
