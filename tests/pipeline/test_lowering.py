"""What is to be made: defaults, and every refusal before any work is done."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from evit_deploy.engines.options import flag
from evit_deploy.environment.requirements import install_line, version_of
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.pipeline.lowering import Lowering, lowering
from evit_deploy.recipe.options import BuildOptions, ConvertOptions
from evit_deploy.registry import RUNTIMES, TARGETS
from evit_deploy.targets.target import usable_targets

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
needs_rtx = pytest.mark.tensorrt_rtx
needs_openvino = pytest.mark.openvino

RTX = "tensorrt-rtx"
SM80 = BuildOptions(gpus=("sm80",))
IMAGES = Path("images")  # whether there are any is asked later


def rtx(**options: Any) -> BuildOptions:
    return BuildOptions(**{"gpus": ("sm80",), **options})


def asked(build: BuildOptions | None = None, **options: Any) -> ConvertOptions:
    return ConvertOptions(**options, **msgspec.structs.asdict(build or BuildOptions()))


def lower(
    targets: Sequence[str] = (), precision: Any = None, build: BuildOptions | None = None, calibration: Any = None
) -> Lowering:
    return lowering(asked(build, targets=tuple(targets), precision=precision, calibration=calibration))


# ---- defaults


@without_gpu
def test_without_a_gpu_the_default_is_an_onnx_file_in_fp32():
    assert lower() == Lowering(("onnx",), "fp32", ConvertOptions())
    assert "tensorrt" not in usable_targets()


@needs_rtx
def test_an_engine_is_in_fp16_unless_asked_otherwise():
    pytest.importorskip("tensorrt_rtx")
    made = lower([RTX], None, SM80)
    assert (made.precision, made.base, made.engine_target) == ("fp16", "fp16", RTX)
    assert lower([RTX], "fp32", SM80).precision == "fp32"


@needs_rtx
def test_targets_are_made_once_each_in_the_order_given():
    pytest.importorskip("tensorrt_rtx")
    made = lower(["onnx", RTX, "onnx", RTX], None, SM80)
    assert made.targets == ("onnx", RTX)
    assert made.engine_target == RTX


@needs_rtx
def test_the_form_of_linear_layers_is_the_target_s_unless_one_is_asked_for(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    assert lower(["onnx"]).linear == lower([RTX], None, SM80).linear == "gemm"
    monkeypatch.setattr(TARGETS.get(RTX), "linear", "matmul")
    assert lower(["onnx"]).linear == "gemm"
    assert lower(["onnx", RTX], None, SM80).linear == "matmul"  # one file for both: the engine decides
    for linear in ("gemm", "matmul"):
        assert lowering(asked(SM80, targets=(RTX,), linear=linear)).linear == linear


@needs_openvino
def test_files_for_a_cpu_are_in_fp32():
    pytest.importorskip("openvino")
    made = lower(["openvino", "onnx"])
    assert (made.precision, made.base, made.engine_target) == ("fp32", "fp32", None)
    assert made.runtimes == ("onnxruntime", "openvino")


def test_what_is_quantized_has_a_base_that_its_target_is_quick_in():
    assert lower(["onnx"], "int8", calibration=IMAGES).base == "fp32"
    assert Lowering((RTX,), "int8", asked(SM80)).base == "fp16"


@needs_openvino
def test_bf16_is_proven_by_openvino():
    pytest.importorskip("openvino")
    assert lower(["onnx"], "bf16").runtimes == ("openvino",)


@pytest.mark.parametrize(
    ("here", "gpus", "runs"),
    [
        (None, ("sm80",), False),
        ("sm89", ("sm80",), False),
        ("sm89", ("sm80", "sm89"), True),
        ("sm89", (), True),
    ],
)
def test_an_engine_is_run_where_one_of_its_gpus_is(monkeypatch, here, gpus, runs):
    # No machine has all of these GPUs.
    monkeypatch.setattr("evit_deploy.targets.tensorrt.compute_capability", lambda: here)
    assert (RTX in Lowering((RTX,), "fp16", asked(BuildOptions(gpus=gpus))).runtimes) is runs


# ---- refusals: exit code 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("more", [{"keep_precision": ("head",)}, {"max_drop": 0.5}, {"sensitivity": True}], ids=str)
def test_what_is_about_quantized_layers_needs_some(precision, more):
    (field,) = more
    with pytest.raises(InputError, match=rf"{flag(field)}: {precision} quantizes no layer.*ask for int8"):
        lowering(ConvertOptions(targets=("onnx",), precision=precision, **more))


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ((["tensort"],), ["'tensort'", "Did you mean 'tensorrt'?", *TARGETS.names()]),
        (([RTX, "tensorrt"], None, SM80), ["--target", "one engine", "tensorrt-rtx and tensorrt", "once for each"]),
        ((["torch-tensorrt", "onnx", RTX], None, SM80), ["--target", "torch-tensorrt and tensorrt-rtx"]),
        ((["onnx"], "fp64"), ["--precision", "'fp64'", "fp32, fp16, bf16, int8, fp8"]),
        (([RTX], "fp64", SM80), ["--precision", "'fp64'"]),
        ((["onnx"], "int8"), ["int8 needs real images", "--calibration", "128"]),
        (([RTX], "int8", SM80), ["int8 needs real images", "--calibration"]),
        ((["onnx"], "fp8"), ["fp8 needs real images"]),
        ((["onnx"], None, None, IMAGES), ["--calibration", "fp32 needs no calibration images"]),
        (([RTX], None, SM80, IMAGES), ["--calibration", "fp16 needs no calibration images"]),
        ((["openvino"], "fp8", None, IMAGES), ["--precision", "openvino has no fp8", "--precision int8"]),
        (
            (["torch-tensorrt"], "int8", None, IMAGES),
            ["torch-tensorrt has no int8", "or --target tensorrt"],
        ),
        ((["torch-tensorrt"], "fp8"), ["--precision", "got fp8"]),
        ((["torch-tensorrt"], None, SM80), ["--gpu", "for the GPU it runs on"]),
        ((["tensorrt"], None, SM80), ["--gpu", "for the GPU it runs on", "--target tensorrt-rtx"]),
        (([RTX], None, rtx(gpus=("sm99",))), ["--gpu", "'sm99'", "sm75, sm80", "An A100 is sm80"]),
        (([RTX], None, rtx(gpus=("a100",))), ["--gpu", "'a100'", "An A100 is sm80"]),
        (([RTX], None, rtx(gpus=("sm80", ""))), ["--gpu", "''"]),
        (([RTX], None, rtx(gpus=("sm90",))), ["--gpu", "'sm90'", "need --target tensorrt."]),
        (([RTX], None, rtx(gpus=("sm80", "sm100"))), ["--gpu", "'sm100'", "need --target tensorrt."]),
        (([RTX], "fp8", SM80, IMAGES), ["--precision", "sm80 cannot compute in fp8", "from sm89 on"]),
        (([RTX], "fp8", rtx(gpus=("sm89", "sm86")), IMAGES), ["sm86 cannot compute in fp8"]),
        (([RTX], "bf16", rtx(gpus=("sm75",))), ["sm75 cannot compute in bf16", "from sm80 on"]),
        (([RTX], None, rtx(timing_cache=Path("cache"))), ["--timing-cache", "TensorRT-RTX has no use"]),
        (([RTX], None, rtx(plugin=Path(__file__))), ["--plugin", "TensorRT-RTX takes no plugins"]),
        (([RTX], None, rtx(plugin=Path("no.so"))), ["--plugin", "TensorRT-RTX takes no plugins"]),
        (([RTX], None, rtx(version_compatible=True)), ["--version-compatible", "in its own version only"]),
        (([RTX], None, rtx(hardware_compatible=True)), ["--hardware-compatible", "repeat --gpu"]),
        ((["tensorrt"], None, BuildOptions(plugin=Path("no.so"))), ["no.so: the library cannot be read"]),
        ((["tensorrt"], None, BuildOptions(timing_cache=Path("no/cache"))), ["--timing-cache", "no/cache"]),
        ((["tensorrt"], None, BuildOptions(timing_cache=Path("/"))), ["--timing-cache", "cannot write there"]),
        ((["torch-tensorrt"], None, BuildOptions(timing_cache=Path("cache"))), ["--timing-cache", "does not use it"]),
        ((["torch-tensorrt"], None, BuildOptions(plugin=Path(__file__))), ["--plugin", "does not use it"]),
        (
            (
                ["torch-tensorrt"],
                None,
                BuildOptions(
                    batches=(
                        (1, 1, 1),
                        (2, 2, 2),
                    )
                ),
            ),
            ["--batch", "choose between optimization profiles"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value))[:70] if value and isinstance(value[0], str) else "",
)
def test_what_contradicts_itself_is_refused(arguments, hints):
    with pytest.raises(InputError) as caught:
        lower(*arguments)
    for hint in hints:
        assert hint in str(caught.value)


@pytest.mark.parametrize("target", [RTX, "tensorrt", "torch-tensorrt"])
@pytest.mark.parametrize(
    ("options", "hints"),
    [
        (
            {
                "batches": (
                    (1, 1, 1),
                    (8, 1, 4),
                )
            },
            ["--batch", "got 8:1:4"],
        ),
        ({"batches": ((4, 2, 8),)}, ["--batch", "got 4:2:8"]),
        ({"batches": ()}, ["--batch", "MIN:OPT:MAX"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_values_that_no_builder_takes(target, options, hints):
    with pytest.raises(InputError) as caught:
        lower([target], None, BuildOptions(gpus=("sm80",) if target == RTX else (), **options))
    for hint in hints:
        assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"gpus": ("sm80",)}, "--gpu"),
        ({"batches": ((1, 2, 4),)}, "--batch"),
        ({"workspace": 64}, "--workspace"),
        ({"optimization_level": 0}, "--optimization-level"),
        ({"version_compatible": True}, "--version-compatible"),
        ({"hardware_compatible": True}, "--hardware-compatible"),
        ({"timing_cache": Path("cache")}, "--timing-cache"),
        ({"plugin": Path(__file__)}, "--plugin"),
    ],
)
def test_without_an_engine_no_option_of_a_builder_is_passed_over(options, name):
    with pytest.raises(InputError, match="there is no engine to build") as caught:
        lower(["onnx"], None, BuildOptions(**options))
    assert str(caught.value).startswith(f"{name}: ")


def test_every_option_of_a_builder_has_its_name_on_the_command_line():
    from evit_deploy.cli.convert import command

    names = {name for option in command.params for name in option.opts}
    assert {flag(field) for field in BuildOptions.__struct_fields__} <= names


@without_gpu
def test_which_gpu_has_to_be_said_where_there_is_none():
    with pytest.raises(InputError, match=r"--gpu: the GPU to build for is unknown.*An A100 is sm80"):
        lower([RTX])


# ---- what is missing: exit code 3, and the line that mends it


@pytest.mark.skipif("tensorrt" in usable_targets(), reason="TensorRT can be used here")
def test_tensorrt_that_cannot_be_used_here():
    with pytest.raises(MissingRequirement) as caught:
        lower(["tensorrt"])
    if version_of("tensorrt") is None:
        assert "tensorrt is not installed" in str(caught.value)
        assert str(caught.value).endswith(f"Run: {install_line('tensorrt')}")
    else:
        assert "--target tensorrt-rtx --gpu sm80" in str(caught.value)


@pytest.mark.skipif("torch-tensorrt" in usable_targets(), reason="Torch-TensorRT can be used here")
def test_torch_tensorrt_that_cannot_be_used_here():
    with pytest.raises(MissingRequirement, match="torch-tensorrt") as caught:
        lower(["torch-tensorrt"])
    assert caught.value.fix


@pytest.mark.skipif(RUNTIMES.get("openvino").missing() is None, reason="OpenVINO is here")
@pytest.mark.parametrize(("targets", "precision"), [(["onnx"], "bf16"), (["openvino"], None)])
def test_openvino_that_is_missing(targets, precision):
    with pytest.raises(MissingRequirement, match="openvino is needed") as caught:
        lower(targets, precision)
    assert "pip install" in str(caught.value)
