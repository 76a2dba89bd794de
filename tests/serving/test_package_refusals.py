"""What is not packaged, and why; nothing is written then."""

import os
import re
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy import package
from evit_deploy.bundle.manifest import DENSE, ENGINE, GOLDEN, PACKAGE, REPORT, Parent, TensorSpec
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import GateFailed, InputError, MissingRequirement
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.report.report import Check
from evit_deploy.serving.options import PackageOptions, TritonOptions
from evit_deploy.serving.package import Package
from evit_deploy.serving.releases import RELEASES, declared_server, same
from tests.support.logs import notices
from tests.support.models import tree
from tests.support.packages import change, change_report, make_package
from tests.support.plugin_files import library

pytest.importorskip("tritonclient.grpc.model_config_pb2")


@pytest.fixture
def refused(tmp_path):
    """Packages, and makes sure that it is refused with these words and nothing is written."""

    def attempt(*bundles, match: str, error: type[Exception] = InputError, target: str = "triton", **options):
        before = tree(tmp_path)
        with pytest.raises(error, match=match):
            make_package([getattr(bundle, "path", bundle) for bundle in bundles], target, **options)
        assert tree(tmp_path) == before

    return attempt


# ---- proof


def failed_check(report):
    return msgspec.structs.replace(
        report, checks=(*report.checks, Check("onnxruntime, batch 1: logits", 2.0, 1.0, False))
    )


DOUBTS = {
    "never verified": (lambda own: change(own, results={}), "no result of a verification"),
    "failed": (lambda own: change(own, results={"passed": False}), "its verification failed"),
    "passed as a text": (lambda own: change(own, results={"passed": "no"}), "its verification failed"),
    "a failed check": (lambda own: change_report(own, failed_check), "a check failed: onnxruntime, batch 1: logits"),
    "another platform": (
        lambda own: change_report(own, lambda report: msgspec.structs.replace(report, checks=())),
        "its report has no check of onnxruntime",
    ),
}


def without_report(own):
    (own.path / REPORT).unlink()
    return change(own)


DOUBTS["no report"] = (without_report, "no result of a verification")


@pytest.mark.parametrize("case", DOUBTS)
def test_what_was_not_verified_is_not_packaged_unless_told_so(case, own, refused):
    alter, words = DOUBTS[case]
    bundle = alter(own)
    refused(bundle, match=f"not verified on onnxruntime: .*{words}.*--unverified", error=GateFailed)
    told = notices()
    place, made = package([bundle.path], "triton", options=PackageOptions(unverified=True))
    assert not made.verified
    assert words in made.doubts[0]
    assert any(note.startswith("NOT verified on onnxruntime") for note in told)
    assert msgspec.json.decode((place / PACKAGE).read_bytes(), type=Package) == made
    assert "NOT verified on onnxruntime" in (place / "README.md").read_text()


@pytest.mark.parametrize("name", ["model.onnx", GOLDEN, DENSE])
def test_a_changed_file(name, own, refused):
    (own.path / name).write_bytes(b"another content")
    refused(own, match=f"changed or missing since it was written: {name}", unverified=True)


def test_a_file_that_is_gone(own, refused):
    (own.path / GOLDEN).unlink()
    refused(own, match=f"changed or missing since it was written: {GOLDEN}")


# ---- the bundle


def test_no_bundle(tmp_path, refused):
    refused(match="no bundle was given")
    refused(tmp_path / "absent", match="no such bundle")
    refused(tmp_path, match="not a bundle")


def test_a_platform_that_the_bundle_has_nothing_for(own, refused):
    refused(own, match=r"nothing for tensorrt: no engine\.plan.*--target tensorrt", platform="tensorrt")
    refused(own, match=r"nothing for openvino: no openvino/model\.xml.*--target openvino", platform="openvino")
    refused(own, match=r"no such platform for triton.*'tensorrt-rtx'", platform="tensorrt-rtx")
    refused(own, match="nothing for tensorrt: .*; tensorrt-rtx: .*; openvino: ", target="cpp")


def test_an_engine_of_another_library(planned, refused):
    bundle = planned(tag=b"vtrt", target="tensorrt-rtx")
    refused(bundle, match="its engine.plan is for tensorrt-rtx", platform="tensorrt")
    assert package([bundle.path], "triton", options=PackageOptions(unverified=True))[1].platform == "onnxruntime"


def test_a_plan_that_is_none(planned, refused):
    bundle = planned()
    (bundle.path / ENGINE).write_bytes(b"\x00\x00\x00\x10{" + bytes(100))
    refused(change(bundle), match="not a TensorRT plan", platform="tensorrt")


def test_a_plan_that_nobody_described(planned, refused):
    bundle = change(planned(), engine=None)
    refused(bundle, match="does not say what engine.plan was built with", platform="tensorrt")


@pytest.mark.parametrize("count", [9, 11])
def test_labels_that_do_not_match_the_classes(count, own, refused, tmp_path):
    (tmp_path / "labels.txt").write_text("a\n" * count)
    wrong = f"labels do not match the classes .got {count} labels, expected 10"
    refused(own, match=wrong, labels=tmp_path / "labels.txt")


def test_labels_that_are_none(own, refused, tmp_path):
    (tmp_path / "labels.bin").write_bytes(b"\xff\xfe" * 20)
    refused(own, match="labels cannot be read", labels=tmp_path / "labels.bin")
    refused(own, match="labels cannot be read", labels=tmp_path / "absent.txt")
    refused(change(own, labels=["two\nlines"] * 10), match="must fit on one line")


@pytest.mark.parametrize(
    "tensors",
    [
        {"outputs": (TensorSpec("features", "float32", (None, 10)),)},
        {"inputs": (TensorSpec("input", "float64", (None, 3, 96, 96)),)},
        {"outputs": (TensorSpec("logits", "float32", (None, 10)), TensorSpec("kept_1", "int64", (None, 4)))},
    ],
)
def test_a_manifest_of_another_model(tensors, own, refused):
    refused(change(own, **tensors), match="does not describe a model that convert makes")


def test_a_model_that_takes_no_photographs(own, refused):
    (image,) = own.manifest.inputs
    gray = change(own, inputs=(msgspec.structs.replace(image, shape=(None, 1, *image.shape[2:])),))
    refused(gray, match="photographs have 3 channels.*got 1.*--preprocess none")
    package([gray.path], "triton", triton=TritonOptions(preprocess="none"))


def test_preprocessing_that_dali_does_not_do(own, refused):
    settings = {"crop_mode": "border", "crop_pct": 1.2, "interpolation": "hamming"}
    odd = change(own, preprocess=msgspec.structs.replace(own.manifest.preprocess, **settings))
    words = "crop mode border; crop_pct 1.2; interpolation hamming.*--preprocess python"
    refused(odd, match=words, triton=TritonOptions(preprocess="dali"))


# ---- several bundles


def test_several_bundles_without_plans(converted, own, refused):
    refused(converted, own, match="packaged together for TensorRT on Triton only.*2 bundles for onnxruntime")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", ["a"] * 10),
        ("precision", "fp16"),
        ("parents", [Parent("other.pth", "0" * 64)]),
        ("preprocess", "crop_pct"),
        ("plan", "blocks"),
    ],
)
def test_bundles_of_other_models(field, value, planned, refused):
    first, second = planned("sm80"), planned("sm90")
    manifest = second.manifest
    if field == "preprocess":
        value = msgspec.structs.replace(manifest.preprocess, crop_pct=0.5)
    elif field == "plan":
        value = msgspec.structs.replace(manifest.plan, blocks=manifest.plan.blocks[:-1])
    other = change(second, **{field: value})
    word = {"parents": "checkpoint"}.get(field, field)
    refused(first, other, match=f"not the same model for another GPU .got another {word} than")


def test_plans_that_cannot_share_a_configuration(planned, refused):
    first = planned("sm80")
    other = planned("sm90", profiles=(BatchProfile(1, 2, 4),))
    refused(first, other, match="another batch profiles than")
    refused(first, planned("sm80"), match="two plans for sm80")
    refused(first, planned("sm90", plugin="0" * 64), match="another plugin than")


# ---- GPU and server


def test_gpus_and_plans_have_to_go_together(planned, own, refused):
    a100, h100 = planned("sm80"), planned("sm90")
    refused(a100, match=r"--gpu sm90: there is no plan for this GPU .got plans for sm80", gpus=["sm80", "sm90"])
    refused(a100, h100, match=r"for a GPU that was not declared .got sm90, expected sm80", gpus=["sm80"])
    refused(a100, match="not a compute capability.*'hopper'", gpus=["hopper"])
    refused(own, match="only a plan depends on the GPU", gpus=["sm80"])
    turing = planned("sm80", options={"hardware_compatible": True})
    refused(turing, match="there is no plan for this GPU", gpus=["sm75"])  # such plans serve Ampere and newer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"server": "26.05"}, r"another TensorRT than the server's.*got 11\.1\.0\.106, expected 10, as in Triton"),
        ({"server": "26.07", "server_tensorrt": "11.2.0"}, r"got 11\.1\.0\.106, expected 11\.2\.0"),
        ({"server": "26.07", "server_tensorrt": "10.15"}, r"26\.07 has another TensorRT .got 10\.15, expected 11"),
        ({"server": "27.01"}, r"TensorRT version of Triton 27\.01 is unknown.*--server-tensorrt"),
        ({"server_tensorrt": "12.0"}, r"no release of Triton with TensorRT 12\.0 is known"),
        ({"server": "24.12"}, "too old"),
        ({"server": "latest"}, "not a version.*'latest'"),
        ({"server": "26"}, "not a release of Triton"),
        ({"server_tensorrt": "eleven"}, "not a version.*'eleven'"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_go_with_the_plan(options, words, planned, refused):
    refused(planned(), match=words, triton=TritonOptions(**options))


def test_an_older_server_for_a_version_compatible_plan(planned, refused):
    lasting = planned(options={"version_compatible": True})
    refused(lasting, match="another TensorRT than the server's", triton=TritonOptions(server="26.01"))


def test_a_later_server_for_a_version_compatible_plan_without_its_lean_runtime(planned, refused):
    lasting = planned(version="10.15.1.29", options={"version_compatible": True, "lean_runtime": False})
    refused(lasting, match="another TensorRT than the server's", triton=TritonOptions(server="26.07"))


def test_a_plan_of_an_unknown_tensorrt(planned, refused):
    refused(planned(version="12.3.0.1"), match=r"no release of Triton with TensorRT 12\.3\.0\.1.*--server-tensorrt")


def test_a_server_s_tensorrt_says_nothing_about_other_files(own, refused):
    refused(own, match="only a plan depends on", triton=TritonOptions(server_tensorrt="11.1"))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_versions_are_compared_as_far_as_both_are_known(one, other):
    first, second = (".".join(map(str, numbers)) for numbers in (one, other))
    shared = min(len(one), len(other), 3)
    assert same(first, second) == same(second, first) == (one[:shared] == other[:shared])


def test_an_older_server_does_not_run_int8(own, refused):
    bundle = change(own, precision="int8")
    for month in ("25.09", "26.01"):
        words = rf"Triton {month} has ONNX Runtime 1\.23\.\d, which does not run int8 .*1\.24 or newer"
        refused(bundle, match=words, triton=TritonOptions(server=month), platform="onnxruntime")


def test_every_known_release_runs_these_models():
    for release, known in RELEASES.items():
        assert declared_server(release, None, None).tensorrt == known.tensorrt
        assert tuple(map(int, known.onnxruntime.split(".")[:2])) >= (1, 23)  # the first with opset 23


# ---- plugin, batches and other options


def test_a_plan_on_a_cpu(planned, refused):
    refused(planned(), match="Triton runs tensorrt on the GPU only", triton=TritonOptions(device="cpu"))


def test_a_plugin_that_is_not_here(planned, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = planned(plugin="5" * 64)
    refused(bundle, match="SHA-256 555555555555, which is not in", error=MissingRequirement)
    refused(bundle, match="built with a different library", plugin=library(tmp_path / "other.so"))
    refused(planned("sm90"), match="the engine needs no plugin", plugin=tmp_path / "other.so")


@pytest.mark.parametrize(
    ("profiles", "max_batch", "words"),
    [
        ([(8, 8, 8)], None, "the plan does not accept a single image"),
        ([(1, 4, 8)], 9, "does not accept every batch size up to this one .got 9, expected at most 8"),
        ([(1, 1, 1), (4, 8, 16)], 16, "got 16, expected at most 1"),
    ],
)
def test_batches_that_the_plan_does_not_take(profiles, max_batch, words, planned, refused):
    bundle = planned(profiles=tuple(BatchProfile(*numbers) for numbers in profiles))
    refused(bundle, match=words, triton=TritonOptions(max_batch=max_batch))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "torchserve"}, "unknown purpose.*expected triton or cpp"),
        ({"triton": TritonOptions(preprocess="torch")}, "unknown preprocessing.*'torch'"),
        ({"triton": TritonOptions(device="npu")}, "--device: not one of these .*'npu'.*gpu or cpu"),
        ({"triton": TritonOptions(publish="all")}, "--publish: not one of these .*'all'.*local or network"),
        ({"triton": TritonOptions(preprocess="dali", device="cpu")}, "runs on the CPU, DALI on a GPU"),
        ({"triton": TritonOptions(preprocess="dali"), "name": "deit_s-evit"}, "other characters than .*'deit_s-evit'"),
        ({"triton": TritonOptions(server_digest="sha256:" + "0" * 64)}, "a digest identifies one image"),
        ({"triton": TritonOptions(server="26.07", server_digest="latest")}, "not a digest .*'latest'"),
        ({"name": "a/b"}, "not a name that Triton takes.*'a/b'"),
        ({"name": ".."}, "not a name that Triton takes"),
        ({"name": "x" * 101}, "not a name that Triton takes"),
        ({"target": "cpp", "triton": TritonOptions(server="26.07")}, "for Triton only"),
    ],
)
def test_options_that_cannot_be(options, words, own, refused):
    refused(own, match=words, **options)


def test_places_that_cannot_be(own, refused, tmp_path):
    refused(own, match="cannot be inside its bundle", out=own.path / "package")
    refused(own, match="cannot be inside its bundle", out=own.path, force=True)
    (tmp_path / "there").mkdir()
    refused(own, match="it exists already", out=tmp_path / "there")


def test_without_tritonclient(own, refused, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tritonclient"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    refused(own, match=re.escape(install_line("triton")), error=MissingRequirement)


def test_a_full_disk_leaves_nothing(own, small_disk: Path):
    place = small_disk / "deep" / "package"
    (small_disk / "ballast").write_bytes(bytes(450_000))
    with pytest.raises(Exception, match="could not be written"):
        package([own.path], "triton", out=place)
    assert os.listdir(small_disk) == ["ballast"]


# ---- the command line


def test_the_command(cli, own):
    done = cli("package", own.path, "--for", "triton", "--name", "tiny")
    assert (done.code, done.err) == (0, "")
    assert Path(done.out.strip()) == own.path.with_name("tiny-triton")
    cli("package", own.path, "--for", "triton", "--name", "tiny").refused(2, "it exists already", "--force")
    again = cli("package", own.path, "--for", "triton", "--name", "tiny", "--force", "--json")
    assert (again.code, again.document["verified"], again.document["platform"]) == (0, True, "onnxruntime")


def test_the_command_s_exit_codes(cli, own, tmp_path):
    cli("package", change(own, results={}).path, "--for", "triton").refused(1, "--unverified")
    cli("package", own.path, "--for", "cpp", "--max-batch", "3").refused(2, "for Triton only")
    cli("package", own.path, "--for", "triton", "--platform", "tensorrt").refused(2, "--target tensorrt")
    cli("package", tmp_path, "--for", "triton").refused(2, "not a bundle")
    assert cli("package", own.path).code == 2
