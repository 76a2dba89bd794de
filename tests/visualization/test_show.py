"""``show``: the same picture from PyTorch, ONNX Runtime and OpenVINO, of any image that a model takes."""

import shutil

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import evit_deploy
from evit_deploy.bundle.bundle import read_bundle, write_manifest
from evit_deploy.data.images import sample_photographs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.drawing.tiles import kept_tile
from evit_deploy.errors import InputError
from evit_deploy.inference.model import load
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from evit_deploy.visualization.show import blocks_to_draw, look, opened, show
from evit_deploy.visualization.subject import subject_of_model
from evit_deploy.visualization.tellers import Teller, Told
from tests.support.models import TINY, preprocess_for, seeded, write_checkpoint

RUNTIMES = ["onnxruntime", "eager", pytest.param("openvino", marks=pytest.mark.openvino)]
QUICK = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory):
    """A bundle whose tokens merge, of patches of 14 pixels, with labels that have markup in them."""
    folder = tmp_path_factory.mktemp("squeezed")
    source = write_checkpoint(folder / "dino.safetensors", "registers, no classes")
    return evit_deploy.convert(source, keep_rate=0.6, method="merge", out=folder / "bundle", measure=QUICK)[0]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_gives_the_same_bytes(runtime, converted):
    reference = show(converted.path, sample_photographs())
    found = show(converted.path, sample_photographs(), runtimes=(runtime,))
    assert found.differences == ()
    assert (found.runtime, reference.runtime) == (runtime, "onnxruntime")
    for one, other in zip(found.images, reference.images, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert one.answer == other.answer
    assert found.sheet().png() == reference.sheet().png()
    assert found.sheet().svg() == reference.sheet().svg()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_gives_the_same_bytes_of_merged_tokens(runtime, squeezed):
    photographs = sample_photographs()
    reference = show(squeezed.path, photographs)
    found = show(squeezed.path, photographs, runtimes=(runtime,))
    assert found.differences == ()
    assert found.images[0].stages[-1].tokens()
    assert found.sheet().png() == reference.sheet().png()


def test_the_picture_shows_what_the_model_kept(converted):
    with load(converted.path, "onnxruntime", threads=1) as model:
        kept = model.kept(sample_photographs())
        best = model.predict(sample_photographs())
    found = show(converted.path, sample_photographs())
    plan = converted.manifest.plan
    assert found.blocks == tuple(row.block for row in plan.locations)
    for image, seen in enumerate(found.images):
        assert seen.grid == (6, 6)
        assert seen.answer == f"class {best[image].label} {100 * best[image].probability:.1f} %"
        for stage in seen.stages:
            numbers = [patch for patch in kept[stage.block][image].tolist() if patch >= 0]
            assert np.flatnonzero(stage.kept).tolist() == sorted(numbers)
            assert not np.isnan(stage.scores[stage.kept]).any()
            bright = kept_tile(seen, stage, side=96)  # 16 pixels a patch: inside a kept one nothing is changed
            for patch in numbers:
                row, column = patch // 6 * 16, patch % 6 * 16
                inside = slice(row + 1, row + 15), slice(column + 1, column + 15)
                np.testing.assert_array_equal(bright[inside], seen.image[inside])


def test_the_image_is_what_the_model_saw(converted):
    photograph = sample_photographs()[0]
    own = converted.manifest.preprocess
    transform = msgspec.structs.replace(own, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).transform()
    wanted = np.rint(transform(photograph).permute(1, 2, 0).numpy() * 255)
    np.testing.assert_array_equal(show(converted.path, photograph).images[0].image, wanted)


@pytest.mark.parametrize(
    ("name", "model_args", "size", "grid"),
    [
        ("vit_tiny_patch16_224", TINY | {"img_size": (64, 128)}, (64, 128), (4, 8)),
        ("vit_small_patch14_dinov2", TINY | {"img_size": (112, 56), "num_classes": 0}, (112, 56), (8, 4)),
        ("vit_tiny_patch16_224", TINY | {"in_chans": 1}, (96, 96), (6, 6)),
    ],
    ids=["wide", "high, patches of 14", "one channel"],
)
@pytest.mark.parametrize("method", ["evit", "merge"])
def test_a_model_of_any_shape_is_shown(name, model_args, size, grid, method):
    model = reduce_tokens_(seeded(name, **model_args), TokenSpec(0.6, method=method, fuse=method == "evit"))
    found = show(model, sample_photographs(), preprocess=Preprocess(size=size))
    assert all((one.grid, one.image.shape) == (grid, (*size, 3)) for one in found.images)
    assert all(stage.scores is not None for one in found.images for stage in one.stages)
    picture = np.asarray(found.picture())
    assert picture.std() > 0
    assert not model.training


def test_a_checkpoint_is_reduced_as_asked(checkpoint_file):
    found = show(checkpoint_file, sample_photographs()[0], keep_rate=0.5, locations=(1, 2), fuse=False)
    assert [(stage.block, stage.count) for stage in found.images[0].stages] == [(1, 18), (2, 9)]
    assert found.images[0].stages[1].tokens() == []
    with pytest.raises(InputError, match="a keep rate is needed"):
        show(checkpoint_file, sample_photographs()[0])


class _Otherwise(Teller):
    """Chooses one patch otherwise in every second image."""

    def __init__(self, teller: Teller) -> None:
        super().__init__("other")
        self._teller = teller

    def tell(self, images: np.ndarray) -> Told:
        told = self._teller.tell(images)
        last = told.choices[-1].copy()
        dropped = next(n for n in range(100) if n not in last[1])
        last[1, 0] = dropped
        return msgspec.structs.replace(told, choices=[*told.choices[:-1], last], scores=[])


def test_a_runtime_that_chooses_otherwise_is_named(converted):
    with opened(converted.path) as subject:
        both = msgspec.structs.replace(subject, tellers=(*subject.tellers, _Otherwise(subject.tellers[0])))
        from evit_deploy.inference.inputs import Given

        given = Given(sample_photographs(), subject.preprocess, subject.shape)
        found = look(both, given, 0, 2)
    block = converted.manifest.plan.locations[-1].block
    assert found.differences == (
        f"onnxruntime and other choose other patches in 1 of 2 images, the first at block {block} of image 1.",
    )


def test_a_file_that_no_cpu_runs_is_asked_in_pytorch(checkpoint_file, tmp_path):
    options = ConvertOptions(precision="bf16")
    bundle = evit_deploy.convert(checkpoint_file, options=options, keep_rate=0.6, out=tmp_path / "low", measure=QUICK)[
        0
    ]
    found = show(bundle.path, sample_photographs()[0])
    assert (found.about[-4:], found.runtime) == ("bf16", "eager")
    assert found.images[0].stages[0].scores is not None


def test_without_the_checkpoint_the_file_is_asked(converted, tmp_path):
    path = shutil.copytree(converted.path, tmp_path / "elsewhere")
    assert show(path, sample_photographs()).images
    with pytest.raises(InputError, match="is not available"):
        show(path, sample_photographs(), runtimes=("eager",))
    source = converted.path.parent / "tiny.safetensors"
    assert show(path, sample_photographs(), runtimes=("eager",), against=source).images
    with pytest.raises(InputError, match="only PyTorch's runtimes"):
        show(path, sample_photographs(), runtimes=("onnxruntime",), against=source)


def test_a_dense_model_has_nothing_to_show(checkpoint_file, tmp_path):
    bundle = evit_deploy.convert(checkpoint_file, keep_rate=1.0, out=tmp_path / "dense", measure=QUICK)[0]
    for source, tokens in ((bundle.path, {}), (checkpoint_file, {"keep_rate": 1.0}), (seeded(), {})):
        with pytest.raises(InputError, match="keeps every patch"):
            show(source, sample_photographs()[0], **tokens)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"keep_rate": 0.5}, "a bundle is shown as it is"),
        ({"model": "deit_small_patch16_224"}, "a bundle is shown as it is"),
        ({"preprocess": Preprocess(size=(96, 96))}, "a bundle is shown as it is"),
        ({"blocks": (0,)}, "reduces no tokens"),
        ({"runtimes": ("triton",)}, "asks a server"),
        ({"runtimes": ("tensorrt",)}, "nothing that tensorrt runs"),
    ],
)
def test_arguments_that_are_about_something_else_are_refused(arguments, what, converted):
    with pytest.raises(InputError, match=what):
        show(converted.path, sample_photographs()[0], **arguments)


def test_a_checkpoint_and_a_model_take_no_runtime(checkpoint_file):
    for source, tokens in ((checkpoint_file, {"keep_rate": 0.5}), (reduce_tokens_(seeded(), TokenSpec(0.5)), {})):
        with pytest.raises(InputError, match="runtimes"):
            show(source, sample_photographs()[0], runtimes=("onnxruntime",), **tokens)
        assert show(source, sample_photographs()[0], runtimes=("eager",), **tokens).images


def test_an_image_that_cannot_be_read_is_an_error_or_left_out(converted, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read"):
        show(converted.path, [sample_photographs()[0], broken])


def test_a_very_large_image_and_a_tiny_one(converted):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 9000, 3), np.uint8))
    found = show(converted.path, [large, Image.new("L", (1, 1), 77)])
    assert all(one.image.shape == (96, 96, 3) for one in found.images)


def test_in_a_notebook_it_is_a_picture(converted):
    found = show(converted.path, sample_photographs())
    assert found._repr_png_() == found.sheet().png()
    assert repr(found).startswith("Shown(2 images, blocks 1, 2, 3: vit_tiny_patch16_224, evit-k0.6, fp32, onnxruntime")
    many = msgspec.structs.replace(found, images=found.images * 9)
    assert many._repr_png_() is None  # 18 images are no picture to look at


def test_a_method_with_many_locations_has_four_columns():
    model = reduce_tokens_(seeded("vit_tiny_patch16_224", **(TINY | {"depth": 12})),
                           TokenSpec(method="tome", options={"merge": 2}))  # fmt: skip
    subject = subject_of_model(model, preprocess_for(model))
    assert blocks_to_draw(subject.plan, ()) == (2, 5, 8, 11)
    assert blocks_to_draw(subject.plan, (7, 0)) == (0, 7)
    found = show(model, sample_photographs()[0])
    assert len(found.images[0].stages) == 12
    assert found.sheet().svg().count("<image ") == 1 + 4 + 4 + 1  # input, stages, scores, legend


def test_labels_and_names_with_markup_stay_text(converted, tmp_path):
    path = shutil.copytree(converted.path, tmp_path / "labeled")
    labels = [f"<b>kind</b> & {number}" for number in range(10)]
    write_manifest(path, msgspec.structs.replace(read_bundle(path).manifest, labels=labels))
    file = tmp_path / "a<svg onload=x>.png"
    sample_photographs()[0].save(file)
    document = show(path, file).sheet().svg()
    assert "<b>" not in document
    assert "<svg onload" not in document
    assert "&lt;b&gt;kind&lt;/b&gt; &amp;" in document


def test_the_model_is_left_as_it_was():
    model = reduce_tokens_(seeded(), TokenSpec(0.6)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    show(model, sample_photographs()[0])
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "model_args", "spec"),
    [
        ("lvvit_s", TINY, TokenSpec(0.6)),
        ("deit_tiny_distilled_patch16_224", TINY, TokenSpec(0.6, method="dynamicvit", fuse=False)),
        ("deit3_small_patch16_224", TINY, TokenSpec(0.6, options={"squeeze": True})),
        ("vit_small_patch14_reg4_dinov2", TINY | {"img_size": 84, "num_classes": 0}, TokenSpec(0.6)),
        ("evo_levit_128s", {"num_classes": 10}, TokenSpec(0.5, method="evo-vit")),
        ("vit_tiny_patch16_224", TINY, TokenSpec(0.6, method="slice")),
        ("vit_tiny_patch16_224", TINY, TokenSpec(0.6, method="random")),
    ],
)
def test_every_family_and_method_can_be_drawn(name, model_args, spec):
    model = reduce_tokens_(seeded(name, **model_args), spec)
    found = show(model, sample_photographs(), preprocess=preprocess_for(model))
    stages = found.images[0].stages
    assert len(stages) == len(token_plan(model).locations)
    assert all((stage.scores is None) == (spec.method == "slice") for stage in stages)
    assert np.asarray(found.picture()).shape == (found.sheet().height, found.sheet().width, 3)
    assert "the score they are ranked by" not in found.sheet().svg() or spec.method != "slice"
