"""An opened bundle: its answers are PyTorch's, from any thread, in any number, until it is closed."""

import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import pytest
import torch

import evit_deploy
from evit_deploy.bundle.bundle import read_bundle, write_manifest
from evit_deploy.bundle.manifest import ENGINE, MODEL
from evit_deploy.data.images import preprocess_image, sample_inputs, sample_photographs
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.inference.model import load
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.recipe.options import BatchProfile, ProfileOptions
from evit_deploy.registry import RUNTIMES
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_
from tests.support.models import write_checkpoint
from tests.support.plans import rtx_plan, tiny_blocks

ON_CPU = [
    "onnxruntime",
    "eager",
    pytest.param("openvino", marks=pytest.mark.openvino),
]


@pytest.fixture(scope="module")
def inputs(converted) -> np.ndarray:
    return sample_inputs(converted.manifest.preprocess, 40)


@pytest.fixture(scope="module")
def pytorch(checkpoint_file):
    return reduce_tokens_(build_model(read_checkpoint(checkpoint_file)), TokenSpec(keep_rate=0.6))


@pytest.fixture
def logits(pytorch, inputs) -> np.ndarray:
    with torch.inference_mode():
        return pytorch(torch.from_numpy(inputs)).numpy()


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(converted.path, tmp_path / "bundle"))


def rewritten(path: Path, **changes) -> Path:
    """The bundle with another manifest, whose hashes are right."""
    manifest = msgspec.structs.replace(read_bundle(path).manifest, **changes)
    write_manifest(path, manifest)
    return path


@pytest.mark.parametrize("runtime", ON_CPU)
def test_the_answers_are_pytorchs(runtime, converted, inputs, logits):
    with load(converted.path, runtime, threads=1) as model:
        assert model.runtime == runtime
        np.testing.assert_allclose(model.logits(inputs), logits, atol=2e-5)
        found = model.predict(inputs, top=3)
    assert len(found) == 40  # more than one call
    shares = torch.from_numpy(logits).softmax(1)
    for prediction, row in zip(found, shares, strict=True):
        assert prediction.classes == tuple(row.topk(3).indices.tolist())
        np.testing.assert_allclose(prediction.probabilities, row.topk(3).values, atol=1e-5)
        assert prediction.labels == tuple(map(str, prediction.classes))


@pytest.mark.parametrize("runtime", ON_CPU)
def test_the_kept_patches_are_pytorchs(runtime, converted, inputs, pytorch):
    with capture(pytorch) as seen, torch.inference_mode():
        pytorch(torch.from_numpy(inputs[:6]))
    with load(converted.path, runtime, threads=1) as model:
        kept = model.kept(inputs[:6])
        again = model.kept(sample_photographs()[0])
    plan = converted.manifest.plan
    assert list(kept) == [row.block for row in plan.locations]
    numbers: list[list[int]] = [list(range(plan.patches))] * 6
    for row, choice in zip(plan.locations, seen.kept, strict=True):
        numbers = [[own[i] for i in image] + [-1] for own, image in zip(numbers, choice.tolist(), strict=True)]
        assert kept[row.block].dtype == np.int32
        assert kept[row.block].tolist() == numbers
        assert again[row.block].shape == (1, row.keep + 1)


def test_a_merging_method_gives_groups(checkpoint_file, tmp_path, inputs):
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, _ = evit_deploy.convert(
        checkpoint_file, method="tome", method_options={"merge": 4}, out=tmp_path / "merged", measure=measure
    )
    plan = bundle.manifest.plan
    with load(bundle.path) as model:
        kept = model.kept(inputs[:3])
    merged = reduce_tokens_(build_model(read_checkpoint(checkpoint_file)), bundle.manifest.tokens)
    with capture(merged) as seen, torch.inference_mode():
        merged(torch.from_numpy(inputs[:3]))
    for image in range(3):
        tokens = [{patch} for patch in range(plan.patches)]  # what is in each token, followed by hand
        for row, choice in zip(plan.locations, seen.kept, strict=True):
            numbers, moving = choice[image].tolist(), len(tokens) - row.keep
            stay, move, join = numbers[: row.keep], numbers[row.keep : row.keep + moving], numbers[row.keep + moving :]
            after = [set(tokens[number]) for number in stay]
            for number, place in zip(move, join, strict=True):
                after[place] |= tokens[number]
            tokens = after
            expected = {patch: min(token) for token in tokens for patch in token}
            assert kept[row.block][image].tolist() == [expected[patch] for patch in range(plan.patches)]


def test_a_dense_model_has_nothing_to_tell(checkpoint_file, tmp_path, inputs):
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, _ = evit_deploy.convert(checkpoint_file, keep_rate=1.0, out=tmp_path / "dense", measure=measure)
    with load(bundle.path) as model:
        assert model.kept(inputs) == {}


def test_one_image_has_one_prediction_and_none_has_none(converted, inputs, tmp_path):
    photograph = sample_photographs()[0]
    photograph.save(tmp_path / "china.png")
    with load(converted.path) as model:
        one = model.predict(tmp_path / "china.png")
        assert one.image == str(tmp_path / "china.png")
        assert model.predict([photograph])[0].probabilities == pytest.approx(one.probabilities)
        assert model.predict(inputs[0]).index == model.predict(inputs[:1])[0].index
        assert model.predict([]) == []
        assert model.logits([]).shape == (0, 10)
        assert {block: rows.shape for block, rows in model.kept([]).items()} == {1: (0, 23), 2: (0, 15), 3: (0, 10)}


def test_an_image_that_cannot_be_used_is_an_error_or_is_noted(converted, inputs):
    images = [inputs[0], b"no image", inputs[1], "gone.png"]
    with load(converted.path, batch_size=2) as model:
        with pytest.raises(InputError, match=r"images\[1\]: the image cannot be read"):
            model.predict(images)
        noted = {}
        found = model.predict(images, on_error=noted.__setitem__)
        assert [one.index for one in found] == [one.index for one in model.predict(inputs[:2])]
        assert list(noted) == [1, 3]
        assert model.predict([b""], on_error=noted.__setitem__) == []


class _FewSizes(OnnxRuntimeRunner):
    """ONNX Runtime with an engine's limits: it remembers which sizes it was given."""

    name = "few-sizes"
    profiles = (BatchProfile(2, 2, 2), BatchProfile(8, 8, 8))
    sizes: ClassVar[list[int]] = []

    def infer(self, feeds):
        self.sizes.append(len(feeds["input"]))
        return super().infer(feeds)


@pytest.mark.parametrize(("count", "sizes"), [(1, [2]), (2, [2]), (3, [8]), (17, [8, 8, 2]), (19, [8, 8, 8])])
def test_an_engines_sizes_are_filled_up(count, sizes, converted, inputs, logits, monkeypatch):
    monkeypatch.setattr(RUNTIMES, "_targets", RUNTIMES._targets | {"few-sizes": f"{__name__}:_FewSizes"})
    monkeypatch.setattr(RUNTIMES, "get", lambda name: _FewSizes if name == "few-sizes" else None)
    monkeypatch.setattr(_FewSizes, "sizes", [])
    with load(converted.path, "few-sizes", threads=1) as model:
        np.testing.assert_allclose(model.logits(inputs[:count]), logits[:count], atol=2e-5)
    assert _FewSizes.sizes == sizes


# Threads.


@pytest.mark.parametrize("runtime", ON_CPU)
def test_threads_may_share_a_model(runtime, converted, inputs):
    with load(converted.path, runtime, threads=1) as model:
        alone = [model.logits(inputs[i : i + 3]) for i in range(12)]
        kept = [model.kept(inputs[i : i + 3]) for i in range(12)]
    with load(converted.path, runtime, threads=1) as model, ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = list(
                pool.map(lambda i: (model.logits(inputs[i : i + 3]), model.kept(inputs[i : i + 3])), range(12))
            )
            for i, (logits, choices) in enumerate(found):
                np.testing.assert_allclose(logits, alone[i], atol=1e-5)
                assert {block: rows.tolist() for block, rows in choices.items()} == {
                    block: rows.tolist() for block, rows in kept[i].items()
                }


@pytest.mark.parametrize("runtime", ON_CPU)
def test_a_model_that_is_closed_refuses_and_what_is_under_way_is_done(runtime, converted, inputs):
    model, started = load(converted.path, runtime, threads=1), threading.Event()
    right = model.predict(inputs)
    outcomes: list[object] = []

    def ask() -> None:
        try:
            while True:
                outcomes.append(model.predict(inputs) == right or model.predict(inputs))
                started.set()
        except InputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(60)
    model.close()
    for thread in threads:
        thread.join(60)
    said = [one for one in outcomes if one is not True]
    assert len(outcomes) > 3
    assert len(said) == 3
    assert all("the model is closed" in str(one) for one in said)
    model.close()  # once more does nothing
    for question in (model.predict, model.logits, model.kept):
        with pytest.raises(InputError, match="the model is closed"):
            question(inputs)


# What is opened.


def test_a_bundle_is_opened_with_the_best_that_runs_here(converted):
    with load(converted.path) as model:
        assert (model.runtime, model.artifact) == ("onnxruntime", converted.path / MODEL)
        assert repr(model) == (f"Model('{converted.path}' on onnxruntime: vit_tiny_patch16_224, fp32, 10 classes)")


@pytest.mark.openvino
def test_a_file_that_was_made_for_this_processor_goes_first(checkpoint_file, tmp_path, inputs, logits):
    options = evit_deploy.ConvertOptions(targets=("openvino",))
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, _ = evit_deploy.convert(
        checkpoint_file, keep_rate=0.6, options=options, out=tmp_path / "made", measure=measure
    )
    with load(bundle.path, threads=1) as model:
        assert (model.runtime, model.artifact.name) == ("openvino", "model.xml")
        np.testing.assert_allclose(model.logits(inputs), logits, atol=2e-5)
    with load(bundle.path, "onnxruntime") as model:
        assert model.artifact.name == MODEL


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: rtx_plan(tiny_blocks(1)), id="for a GPU", marks=pytest.mark.tensorrt_rtx),
        lambda: b"no plan",
    ],
)
def test_an_engine_that_does_not_run_here_is_said(make, copy, caplog):
    (copy / ENGINE).write_bytes(make())
    with caplog.at_level(logging.WARNING, "evit_deploy"), load(rewritten(copy)) as model:
        assert model.runtime == "onnxruntime"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("engine.plan does not run here (")
    assert said.endswith("; onnxruntime answers in its place, from model.onnx.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_a_bundle_without_a_file_for_this_machine_is_refused(copy):
    (copy / MODEL).unlink()
    (copy / ENGINE).write_bytes(b"no plan")
    with pytest.raises(MissingRequirement, match=r"nothing here runs any file of this bundle \(tensorrt: .*doctor"):
        load(rewritten(copy))


@pytest.mark.parametrize(
    ("runtime", "options", "error", "hints"),
    [
        ("onnxruntme", {}, InputError, ["unknown runtime", "Did you mean 'onnxruntime'?"]),
        ("triton", {}, InputError, ["asks a server", "evit_deploy.triton.client"]),
        ("tensorrt", {}, InputError, ["nothing that tensorrt runs", "engine.plan"]),
        ("onnxruntime", {"against": "x.pth"}, InputError, ["needs no checkpoint", "x.pth"]),
        ("eager", {"against": "gone.pth"}, InputError, ["is not available", "gone.pth is gone"]),
        (None, {"against": "x.pth"}, InputError, ["only PyTorch's runtimes", "runtime='eager'"]),
        (None, {"threads": 0}, InputError, ["threads", "got 0", "from 1 up"]),
        (None, {"batch_size": -1}, InputError, ["batch_size", "got -1"]),
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_refused(runtime, options, error, hints, converted):
    with pytest.raises(error) as caught:
        load(converted.path, runtime, **options)
    for hint in hints:
        assert hint in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_a_runtime_that_is_not_here_is_missing(converted):
    with pytest.raises(MissingRequirement, match="CUDAExecutionProvider"):
        load(converted.path, "onnxruntime-cuda")


@pytest.mark.parametrize("name", [MODEL, "dense/model.onnx", "golden.npz"])
def test_a_file_that_is_not_as_it_was_written_is_refused(name, copy):
    with (copy / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(InputError, match=f"changed or are missing: {name}"):
        load(copy)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a bundle \(no manifest.json in it\)"):
        load(tmp_path)
    with pytest.raises(InputError, match="no such bundle"):
        load(tmp_path / "gone")


def test_labels_are_the_manifests(copy, inputs):
    names = [f"<kind {number}>" for number in range(10)]
    with load(rewritten(copy, labels=names)) as model:
        assert model.labels == names
        assert model.predict(inputs[0]).label == names[model.predict(inputs[0]).index]
    with pytest.raises(
        InputError, match=r"the number of labels is not the number of classes \(got 3 labels for 10 classes\)"
    ):
        load(rewritten(copy, labels=names[:3]))


def test_a_model_without_classes_answers_with_embeddings(tmp_path):
    source = write_checkpoint(tmp_path / "registers.safetensors", "registers, no classes")
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, _ = evit_deploy.convert(source, keep_rate=0.6, out=tmp_path / "bundle", measure=measure)
    pytorch = reduce_tokens_(build_model(read_checkpoint(source)), TokenSpec(keep_rate=0.6))
    inputs = sample_inputs(bundle.manifest.preprocess, 4)
    with load(bundle.path) as model, torch.inference_mode():
        found = model.embed(inputs)
        np.testing.assert_allclose(found, pytorch(torch.from_numpy(inputs)).numpy(), atol=2e-5)
        assert found.dtype == np.float32
        assert model.embed(sample_photographs()[0]).shape == (1, 48)
        assert "embeddings of 48 numbers" in repr(model)
        assert set(model.kept(inputs[:1])) == {1, 2, 3}
        for question in (model.predict, model.logits):
            with pytest.raises(InputError, match=r"this model has no classes\. Use embed\."):
                question(inputs)


def test_a_model_of_one_channel_takes_pictures(tmp_path):
    source = write_checkpoint(tmp_path / "gray.safetensors", "qk-norm, one channel")
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, _ = evit_deploy.convert(source, keep_rate=0.6, out=tmp_path / "gray", measure=measure)
    pytorch = reduce_tokens_(build_model(read_checkpoint(source)), TokenSpec(keep_rate=0.6))
    images = sample_photographs()
    colors = np.stack([preprocess_image(image, bundle.manifest.preprocess) for image in images])
    gray = colors.mean(axis=1, keepdims=True)
    with load(bundle.path) as model, torch.inference_mode():
        expected = pytorch(torch.from_numpy(gray)).numpy()
        np.testing.assert_allclose(model.logits(images), expected, atol=2e-5)
        np.testing.assert_allclose(model.logits(gray), expected, atol=2e-5)
        with pytest.raises(InputError, match=r"got \[3, 96, 96\], expected \[1, 96, 96\]"):
            model.logits(colors)


def test_a_classifier_has_no_embedding(converted, inputs):
    with load(converted.path) as model, pytest.raises(InputError, match="answers with classes"):
        model.embed(inputs)
