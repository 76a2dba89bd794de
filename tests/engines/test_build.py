"""Engines: what the builder makes of each kind of model, and what is left when it fails. Nothing here needs a GPU."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
import timm
import torch

from evit_deploy.engines import build
from evit_deploy.engines.audit import engine_checks
from evit_deploy.engines.build import Built, build_engine
from evit_deploy.engines.layers import is_fused_attention
from evit_deploy.engines.plan_file import read_header
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.environment.availability import RTX_GPUS
from evit_deploy.errors import EvitDeployError, InputError, StageError
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import QUANTIZED, set_precision
from evit_deploy.recipe.options import BatchProfile, BuildOptions
from evit_deploy.tokens.plan import TokenPlan, TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support import levit_oracle
from tests.support.models import KEEP, KINDS, images, of_kind, preprocess_for, seeded, tree

pytestmark = pytest.mark.tensorrt_rtx
pytest.importorskip("tensorrt_rtx")

RTX = "tensorrt-rtx"
TWO_BLOCKS = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
SIZES = ((1, 4, 8),)
BATCHES = (BatchProfile(1, 4, 8),)


class Exported:
    """A seeded reduced model as FP32 ONNX, and in other precisions as they are asked for."""

    def __init__(self, model: torch.nn.Module, spec: TokenSpec, folder: Path) -> None:
        self.model = reduce_tokens_(model, spec)
        self.plan: TokenPlan = token_plan(self.model)
        self.proto = export_onnx(self.model, name="seeded", preprocess=preprocess_for(self.model))
        self.folder = folder

    def file(self, precision: str) -> Path:
        path = self.folder / f"{precision}.onnx"
        if not path.exists():
            calibration = images(self.model, 8) if precision in QUANTIZED else None
            lowered = self.proto
            if precision != "fp32":
                lowered = set_precision(self.proto, precision, base="fp16", calibration=calibration)
            onnx.save(lowered, path)
        return path


@pytest.fixture(scope="module")
def of(tmp_path_factory) -> Callable[[str], Exported]:
    """The model of a kind, exported once."""
    return functools.cache(lambda name: Exported(of_kind(name), KEEP, tmp_path_factory.mktemp("kind")))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    """The smallest model that is still built whole. Its files are read only."""
    return Exported(seeded(**TWO_BLOCKS), TokenSpec(keep_rate=0.5, locations=(0,)), tmp_path_factory.mktemp("exported"))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Where an engine may go: an empty folder."""
    return tmp_path / "engine.plan"


def built(model: Path, plan: Path, precision: str, *gpus: str, profiles: tuple[BatchProfile, ...] = BATCHES) -> Built:
    options = BuildOptions(batches=tuple(map(msgspec.structs.astuple, profiles)), gpus=gpus)
    return build_engine(model, plan, RTX, precision, options)


def says(error: type[EvitDeployError], model: Path, plan: Path, options: BuildOptions, precision: str = "fp16") -> str:
    """What a build that has to fail says; nothing may be left of it."""
    with pytest.raises(error) as caught:
        build_engine(model, plan, RTX, precision, options)
    assert tree(plan.parent) == {}
    return str(caught.value)


# ---- what is built


EVERYWHERE = (("fp16", "sm120"), ("bf16", "sm89"), ("int8", "sm80"), ("fp8", "sm120"))
ON_PLAIN = (
    *(("fp32", "sm86"), ("fp16", "sm80"), ("bf16", "sm80"), ("bf16", "sm120")),
    *(("int8", "sm89"), ("int8", "sm120"), ("fp8", "sm89")),
)


@pytest.mark.parametrize(
    ("name", "precision", "gpu"),
    [("plain", *pair) for pair in (*EVERYWHERE, *ON_PLAIN)]
    + [pytest.param(name, *pair, marks=pytest.mark.slow) for name in KINDS if name != "plain" for pair in EVERYWHERE],
)
def test_every_kind_in_every_precision(of, plan, name, precision, gpu):
    kind = of(name)
    result = built(kind.file(precision), plan, precision, gpu)
    report = engine_checks(result, plan, kind.plan, listing=plan_layers)
    assert report.passed, report.failed
    assert report.notes == ()
    names = [check.name for check in report.checks]
    assert names == [f"engine: matmuls in {precision}"] + ["engine: fused attentions"] * (precision != "fp32")
    assert result.attentions == len(kind.plan.blocks)
    nodes = {node for layer in plan_layers(plan) for node in layer.nodes}
    for row in kind.plan.locations:  # the operator's body is inside
        assert any(node.startswith(f"blocks.{row.block}.token_reorg/") for node in nodes), row.block
    header = read_header(plan)
    assert (header.family, header.gpus) == (RTX, (gpu,))
    assert (header.version, header.gpus) == (result.engine.version, result.engine.gpus)
    assert list(tree(plan.parent)) == ["engine.plan"]


@pytest.mark.parametrize(("precision", "gpu"), [("int8", "sm80"), ("fp8", "sm89")])
def test_layers_that_were_left_out_of_quantizing_are_in_16_bits(of, tmp_path, plan, precision, gpu):
    kind, kept = of("plain"), ("blocks.1.mlp.fc2", "blocks.2.attn.proj")
    calibration = images(kind.model, 8)
    path = tmp_path / "model.onnx"
    onnx.save(set_precision(kind.proto, precision, base="fp16", calibration=calibration, keep=kept), path)
    result = built(path, plan, precision, gpu)
    report = engine_checks(result, plan, kind.plan, listing=plan_layers, unquantized=kept)
    assert report.passed, report.failed
    (failed,) = engine_checks(result, plan, kind.plan, listing=plan_layers).failed
    assert failed.name == f"engine: matmuls in {precision}"
    assert "blocks.1.mlp.inner.fc2/Gemm" in failed.reason
    assert "blocks.2.attn.proj/Gemm" in failed.reason


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_method_with_layers_of_its_own(tmp_path, plan, precision):
    """DynamicViT's predictors are in the engine, and attention stays fused."""
    model = Exported(of_kind("plain"), TokenSpec(keep_rate=0.6, method="dynamicvit"), tmp_path)
    result = built(model.file(precision), plan, precision, "sm80")
    report = engine_checks(result, plan, model.plan, listing=plan_layers)
    assert report.passed, report.failed
    assert result.attentions == len(model.plan.blocks)
    nodes = {node for layer in plan_layers(plan) for node in layer.nodes}
    for number, row in enumerate(model.plan.locations):
        assert any(node.startswith(f"blocks.{row.block}.token_reorg/") for node in nodes), row.block
        assert any(node.startswith(f"score_predictor.{number}.out_conv.2/") for node in nodes), number


@pytest.mark.parametrize("representative", [False, True])
def test_evo_vit_with_attention_fused(tmp_path, plan, representative):
    """Tokens that wait, and a number for each that a later location sorts by."""
    spec = TokenSpec(keep_rate=0.6, method="evo-vit", options={"representative": representative})
    model = Exported(of_kind("plain"), spec, tmp_path)
    result = built(model.file("fp16"), plan, "fp16", "sm80")
    report = engine_checks(result, plan, model.plan, listing=plan_layers)
    assert report.passed, report.failed
    assert result.attentions == len(model.plan.blocks)
    nodes = {node for layer in plan_layers(plan) for node in layer.nodes}
    for row in model.plan.locations:
        assert any(node.startswith(f"blocks.{row.block}.token_reorg/") for node in nodes), row.block


def test_what_the_manifest_says_of_an_engine(exported, plan):
    options = BuildOptions(batches=SIZES, gpus=("sm80", "sm80"), workspace=512, optimization_level=1)
    engine = build_engine(exported.file("fp16"), plan, RTX, "fp16", options).engine
    assert (engine.target, engine.precision, engine.profiles, engine.plugin) == (RTX, "fp16", BATCHES, None)
    assert engine.gpus == ("sm80",)  # each once
    assert engine.options["workspace"] == 512
    assert engine.options["optimization_level"] == 1
    assert 0 < engine.seconds < 60


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_one_plan_for_every_gpu_that_is_offered(exported, plan, precision):
    gpus = tuple(name for name in RTX_GPUS if name != "sm75")  # which takes no fused token, see below
    result = built(exported.file(precision), plan, precision, *gpus)
    assert result.engine.gpus == gpus
    assert read_header(plan).gpus == gpus
    assert engine_checks(result, plan, exported.plan, listing=plan_layers).passed


@pytest.mark.parametrize(
    ("profiles", "rows"),
    [
        ((BatchProfile(1, 4, 8),), [-1]),
        ((BatchProfile(3, 3, 3),), [3]),
        ((BatchProfile(1, 1, 1), BatchProfile(2, 8, 16), BatchProfile(5, 5, 5)), [1, -1, 5]),
    ],
    ids=["a range", "a fixed batch", "three profiles"],
)
def test_the_plan_has_kernels_for_every_profile(exported, plan, profiles, rows):
    result = built(exported.file("fp16"), plan, "fp16", "sm80", profiles=profiles)
    assert result.engine.profiles == profiles
    attentions = [layer for layer in plan_layers(plan) if is_fused_attention(layer)]
    heads, depth = TWO_BLOCKS["num_heads"], TWO_BLOCKS["depth"]
    found = [layer.inputs[0].dimensions[0] for layer in attentions]  # a fixed batch is part of the kernel's own shape
    assert found == [row if row == -1 else row * heads for row in rows for _ in range(depth)]
    assert engine_checks(result, plan, exported.plan, listing=plan_layers).passed


def test_an_engine_that_is_not_what_was_asked_for_fails_its_checks(exported, plan):
    result = built(exported.file("fp32"), plan, "fp32", "sm80")
    (check,) = engine_checks(result, plan, exported.plan, listing=plan_layers).checks
    assert check.passed
    posing = Built(msgspec.structs.replace(result.engine, precision="fp16"), result.attentions, None)
    report = engine_checks(posing, plan, exported.plan, "dense engine", plan_layers)
    assert [check.name for check in report.failed] == [
        "dense engine: matmuls in fp16",
        "dense engine: fused attentions",
    ]


def test_an_older_plan_is_replaced_by_a_build_and_kept_by_a_failure(exported, plan):
    plan.write_bytes(b"older")
    with pytest.raises(StageError):
        build_engine(exported.file("fp16"), plan, RTX, "fp16", BuildOptions(gpus=("sm80",), workspace=1))
    assert tree(plan.parent) == {"engine.plan": b"older"}
    built(exported.file("fp16"), plan, "fp16", "sm80")
    assert read_header(plan).family == RTX


def test_what_lies_in_the_current_folder_is_no_module(exported, plan, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("user")
    for name in ("json", "tensorrt_rtx", "polygraphy", "evit_deploy"):
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(folder)
    built(exported.file("fp16"), plan, "fp16", "sm80")
    assert plan.is_file()


@pytest.mark.slow
def test_deit_s(tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    exported = Exported(model, TokenSpec(keep_rate=0.7), tmp_path)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "engine.plan"
    result = build_engine(exported.file("fp16"), path, RTX, "fp16", BuildOptions(gpus=("sm80", "sm89")))
    report = engine_checks(result, path, exported.plan, listing=plan_layers)
    assert report.passed, report.failed
    assert result.attentions == 12
    assert path.stat().st_size > 30e6


# ---- what is refused, and what fails


SM80 = BuildOptions(batches=SIZES, gpus=("sm80",))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("absent", "no such file"),
        ("folder", "no such file"),
        ("empty", "not an ONNX model"),
        ("text", "not an ONNX model"),
        ("truncated", "not an ONNX model"),
        ("not ours", "not a model that evit-deploy exported"),
        ("another precision", "got fp32, expected fp16"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(exported, plan, tmp_path_factory, name, hint):
    model = tmp_path_factory.mktemp("models") / "model.onnx"
    content = exported.file("fp32" if name == "another precision" else "fp16").read_bytes()
    proto = onnx.load_from_string(content)
    del proto.metadata_props[:]
    contents = {
        "empty": b"",
        "text": b"hello world\n",
        "truncated": content[:-100],
        "not ours": proto.SerializeToString(),
        "another precision": content,
    }
    if name == "folder":
        model.mkdir()
    elif name != "absent":
        model.write_bytes(contents[name])
    message = says(InputError, model, plan, SM80)
    assert message.startswith(f"{model}: ")
    assert hint in message


def changed(exported: Exported, folder: Path, operator: str) -> Path:
    """The FP16 file with another operator for its last node."""
    proto = onnx.load(exported.file("fp16"))
    proto.graph.node[-1].op_type = operator
    onnx.save(proto, folder / "changed.onnx")
    return folder / "changed.onnx"


@pytest.mark.parametrize("operator", ["Det", "Frobnicate"])  # one of ONNX's own, and one of nobody's
def test_an_operator_that_the_parser_does_not_know_is_named(exported, plan, tmp_path_factory, operator):
    model = changed(exported, tmp_path_factory.mktemp("models"), operator)
    message = says(StageError, model, plan, SM80)
    assert message.startswith(f"{RTX}: no engine of changed.onnx could be built: In node ")
    assert f"operator: {operator} " in message


def test_a_file_without_the_operator_s_body(exported, plan, tmp_path_factory):
    model = tmp_path_factory.mktemp("models") / "bodiless.onnx"
    proto = onnx.load(exported.file("fp16"))
    del proto.functions[:]
    onnx.save(proto, model)
    assert "operator: TokenReorg" in says(StageError, model, plan, SM80)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Exported:
    """Heads of 8: no kernel fuses their attention."""
    model = seeded(**TWO_BLOCKS | {"embed_dim": 24, "num_heads": 3})
    return Exported(model, TokenSpec(keep_rate=0.5, locations=(0,)), tmp_path_factory.mktemp("narrow"))


def test_heads_without_a_fused_kernel_fail_in_the_library_s_words(narrow, plan):
    message = says(StageError, narrow.file("fp16"), plan, SM80)
    assert "Attention operation was not supported by a dedicated kernel" in message
    assert message.endswith("Use --precision fp32, where attention may be taken apart.")
    result = built(narrow.file("fp32"), plan, "fp32", "sm80")  # as it says
    assert engine_checks(result, plan, narrow.plan, listing=plan_layers).passed


def test_turing_takes_no_fused_token(exported, plan, tmp_path_factory):
    message = says(StageError, exported.file("fp16"), plan, BuildOptions(gpus=("sm75",)))
    assert message.endswith("convert with --no-fuse, or without sm75.")
    spec = TokenSpec(keep_rate=0.5, locations=(0,), fuse=False)
    unfused = Exported(seeded(**TWO_BLOCKS), spec, tmp_path_factory.mktemp("unfused"))
    built(unfused.file("fp16"), plan, "fp16", "sm75")  # as it says
    assert read_header(plan).gpus == ("sm75",)


def test_what_the_builder_cannot_do(exported, plan):
    message = says(StageError, exported.file("fp16"), plan, BuildOptions(gpus=("sm80",), workspace=1))
    assert message.endswith("Give a larger --workspace, or none.")


# ---- a builder that comes to a bad end


def builders() -> list[int]:
    """Process ids of the builders that this process has started."""
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return [child for child in found if b"evit_deploy.engines.build" in Path(f"/proc/{child}/cmdline").read_bytes()]


def stop_the_builder(number: signal.Signals, folder: Path) -> None:
    """Waits until a builder is at work, and sends it a signal."""
    deadline = time.monotonic() + 60
    while not (builders() and tree(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for child in builders():
        os.kill(child, number)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_builder_that_is_killed(exported, plan, number):
    killer = threading.Thread(target=stop_the_builder, args=(number, plan.parent))
    killer.start()
    message = says(StageError, exported.file("fp16"), plan, SM80)
    killer.join()
    assert f"its process was ended by {number.name}" in message
    assert ("for want of memory" in message) == (number == signal.SIGKILL)


def test_a_builder_that_takes_too_long(exported, plan, monkeypatch):
    monkeypatch.setattr(build, "TIME_LIMIT", 0.1)
    assert "after 0.1 seconds" in says(StageError, exported.file("fp16"), plan, SM80)
    assert builders() == []


def test_a_full_disk(exported, small_disk):
    message = says(StageError, exported.file("fp16"), small_disk / "engine.plan", SM80)
    assert "No space left on device" in message


def test_a_folder_that_is_not_there(exported, tmp_path):
    with pytest.raises(StageError, match="could not be written"):
        build_engine(exported.file("fp16"), tmp_path / "absent" / "engine.plan", RTX, "fp16", SM80)
    assert tree(tmp_path) == {}


_BUILD = """
import sys
from pathlib import Path
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.engines.build import build_engine
build_engine(Path(sys.argv[1]), Path(sys.argv[2]), "tensorrt-rtx", "fp16", BuildOptions(gpus=("sm80",)))
"""


def test_an_interruption_ends_the_builder_and_leaves_nothing(exported, plan):
    parent = subprocess.Popen(
        [sys.executable, "-c", _BUILD, exported.file("fp16"), plan],
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with parent:
        while not tree(plan.parent) and parent.poll() is None:
            time.sleep(0.01)
        parent.send_signal(signal.SIGINT)
        _, err = parent.communicate(timeout=60)
    assert err.strip().endswith(b"KeyboardInterrupt")
    assert tree(plan.parent) == {}


def test_an_evo_levit_builds_and_says_that_nothing_fuses_its_attention(plan, tmp_path_factory):
    model = timm.create_model("evo_levit_128s", **levit_oracle.TINY_ARGS)
    drawn = levit_oracle.weights({key: value.shape for key, value in model.state_dict().items()})
    model.load_state_dict({key: torch.from_numpy(value) for key, value in drawn.items()})
    small = Exported(model.eval(), TokenSpec(0.5, method="evo-vit"), tmp_path_factory.mktemp("levit"))
    report = engine_checks(built(small.file("fp16"), plan, "fp16", "sm80"), plan, small.plan, listing=plan_layers)
    assert report.passed
    assert [check.name for check in report.checks] == ["engine: matmuls in fp16"]
    assert "no fused kernel" in report.notes[-1]
