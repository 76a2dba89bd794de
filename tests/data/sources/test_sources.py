"""Images from class folders, tar files, WebDataset shards and Hugging Face datasets, and what is wrong with them."""

import io
import itertools
import json
import os
import re
import shutil
import tarfile

import msgspec
import pytest
import torch
from PIL import Image

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.class_folders import Folder
from evit_deploy.data.sources.shards import _expanded
from evit_deploy.data.sources.source import Place
from evit_deploy.data.sources.sources import open_source
from evit_deploy.data.training import folder as folder_data
from evit_deploy.data.training.training_data import open_data
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement, RecipeError
from evit_deploy.recipe.sections import DataSection
from tests.support.logs import notices

SMALL = Preprocess(size=(16, 16), crop_pct=1.0)
CLASSES = ("cat", "dog", "eel")


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 24), (shade, shade, shade)).save(file, "png")
    return file.getvalue()


def shade(label, number):
    return 40 * label + 5 * number


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_folder(root):
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(4):
            (root / name / f"{number}.png").write_bytes(png(shade(label, number)))
    return str(root)


def make_tar(root):
    root.mkdir(parents=True)
    with tarfile.open(root / "images.tar", "w") as tar:
        for label, name in enumerate(CLASSES):
            for number in range(4):
                add(tar, f"{name}/{number}.png", png(shade(label, number)))
    return str(root / "images.tar")


def make_tars(root):
    root.mkdir(parents=True)
    for label, name in enumerate(CLASSES):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for number in range(4):
                add(tar, f"{number}.png", png(shade(label, number)))
    return str(root)


def make_shards(root):
    root.mkdir(parents=True)
    samples = list(itertools.product(range(3), range(4)))
    for shard in range(2):
        with tarfile.open(root / f"part-{shard:04}.tar", "w") as tar:
            for label, number in samples[shard * 6 : shard * 6 + 6]:
                add(tar, f"{label}_{number}.png", png(shade(label, number)))
                add(tar, f"{label}_{number}.cls", str(label).encode())
                add(tar, f"{label}_{number}.json", json.dumps({"kind": label, "name": "x"}).encode())
    return f"wds/{root}"


def make_dataset(root, split="train"):
    datasets = pytest.importorskip("datasets", reason=install_line("data"))
    pairs = list(itertools.product(range(3), range(4)))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [{"bytes": png(shade(*pair)), "path": None} for pair in pairs], "label": [a for a, _ in pairs]}
    root.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-0.parquet")
    return f"hfds/{root}"


MAKERS = [make_folder, make_tar, make_tars, make_shards, make_dataset]


@pytest.mark.parametrize("make", MAKERS)
def test_every_source_gives_the_same_images_labels_and_classes(make, tmp_path):
    source = open_source(Place(make(tmp_path / "images"), num_classes=3))
    assert len(source) == 12
    assert source.classes == (("0", "1", "2") if make is make_shards else CLASSES)
    found = sorted((label, image.getpixel((3, 3))[0], image.size) for image, label in map(source.load, range(12)))
    assert found == [(label, shade(label, number), (20, 24)) for label, number in itertools.product(range(3), range(4))]
    assert len({source.name(i) for i in range(12)}) == 12 or make is make_dataset
    assert source.stamp() == open_source(Place(make_again(source, make, tmp_path), num_classes=3)).stamp()


def make_again(source, make, tmp_path):
    root = tmp_path / "images"
    names = {make_tar: f"{root}/images.tar", make_shards: f"wds/{root}", make_dataset: f"hfds/{root}"}
    return names.get(make, str(root))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_source_trains_and_validates(make, workers, tmp_path):
    path = make(tmp_path / "images")
    section = DataSection(
        name="folder", train=path, validation=path, validation_split="train" if make is make_dataset else None,
        workers=workers, num_classes=3, mixup=0, cutmix=0, auto_augment=None, color_jitter=0, random_erasing=0,
    )  # fmt: skip
    data = open_data(section, SMALL)
    seen = []
    for images, labels in itertools.islice(data.training(6, 0), 2):
        shades = ((images[:, 0, 8, 8] * 0.229 + 0.485) * 255).round().tolist()
        assert [int(value) // 40 for value in shades] == labels.tolist()
        seen += shades
    assert sorted(seen) == [shade(*pair) for pair in itertools.product(range(3), range(4))]
    assert sum(len(labels) for _, labels in data.validation(5)) == 12
    assert data.calibration(4).shape == (4, 3, 16, 16)


def test_classes_of_validation_are_numbered_as_in_training(tmp_path):
    make_tar(tmp_path / "a")
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for name in ("eel", "cat"):
            add(tar, f"{name}/1.png", png(9))
    source = open_source(Place(str(tmp_path / "two.tar")), CLASSES)
    assert [source.load(i)[1] for i in range(2)] == [0, 2]
    assert source.classes == CLASSES


@pytest.mark.parametrize("make", [make_folder, make_tar, make_dataset])
def test_classes_that_training_does_not_know_are_refused(make, tmp_path):
    path = make(tmp_path / "images")
    with pytest.raises(InputError, match=r"eel|dog"):
        open_source(Place(path), ("cat", "cow", "dog"))


def test_brace_notation_is_the_shells():
    assert _expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert _expanded("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    assert _expanded("plain.tar") == ["plain.tar"]


def test_shards_are_chosen_by_notation_or_by_info(tmp_path):
    path = make_shards(tmp_path / "images")
    for split in ("part-{0001..0001}.tar", "part-0001.tar|6", "second"):
        info = {"splits": {"second": {"filenames": ["part-0001.tar"], "num_samples": 6}}}
        (tmp_path / "images" / "_info.json").write_text(json.dumps(info))
        source = open_source(Place(path, split, num_classes=3))
        assert sorted({source.load(i)[1] for i in range(len(source))}) == [1, 2]
        assert len(source) == 6
    assert open_source(Place(path, target_key="kind", num_classes=3)).load(11)[1] == 2
    for split, word in [("part-{0001..0002}.tar", r"part-0002\.tar: no such shard"), ("third", "no split 'third'")]:
        with pytest.raises(InputError, match=word):
            open_source(Place(path, split, num_classes=3))


@pytest.mark.parametrize(
    ("place", "word"),
    [
        (Place("none.tar"), "no such tar"),
        (Place("none"), "no such folder"),
        (Place("wds/none", num_classes=3), "no such folder"),
        (Place("wds/{root}"), r"data\.num_classes"),
        (Place("wds/{root}", num_classes=2), "label is not among the classes.*got 2.*0 to 1"),
        (Place("wds/{root}", target_key="name", num_classes=3), "the label cannot be read.*an integer"),
        (Place("wds/{root}", target_key="none", num_classes=3), "the label cannot be read"),
        (Place("tfds/mnist"), "'tfds'"),
        (Place("{root}/text.tar"), "text.tar.*cannot be read"),
        (Place("{root}/empty.tar"), "no images"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_place_and_reason(place, word, tmp_path):
    make_shards(tmp_path / "images")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.tar").write_text("no tar" * 200)
    tarfile.open(tmp_path / "bad" / "empty.tar", "w").close()
    root = tmp_path / ("images" if place.path.startswith("wds") else "bad")
    bad = Place(place.path.replace("{root}", str(root)), None, None, place.target_key, place.num_classes)
    with pytest.raises(InputError, match=word):
        open_source(bad)


def test_a_shard_with_an_image_but_no_label_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", png(1))
    with pytest.raises(InputError, match=r"a\.tar: 1\.png: an image has no \.cls"):
        open_source(Place(f"wds/{tmp_path}", num_classes=3))


def test_a_dataset_without_the_column_or_the_split_is_refused(tmp_path):
    path = make_dataset(tmp_path / "images")
    with pytest.raises(InputError, match=r"no column 'kind'.*image, label.*data\.target_key"):
        open_source(Place(path, target_key="kind"))
    with pytest.raises(InputError, match=r"split"):
        open_source(Place(path, "test"))
    with pytest.raises(InputError, match="cannot be opened"):
        open_source(Place(f"hfds/{tmp_path}/none"))


def test_a_missing_package_names_its_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets.exceptions", None)
    with pytest.raises(MissingRequirement, match=re.escape(install_line("data"))):
        open_source(Place("hfds/x"))


def test_an_empty_class_folder_is_refused(tmp_path):
    path = make_folder(tmp_path / "images")
    (tmp_path / "images" / "fox").mkdir()
    with pytest.raises(InputError, match=r"fox: this class folder holds no images"):
        open_source(Place(path))


def folder(tmp_path, **changes):
    path = make_folder(tmp_path / "images")
    section = {"name": "folder", "train": path, "validation": path, "workers": 0, "mixup": 0, "cutmix": 0}
    return DataSection(**(section | changes))


def spoil(tmp_path, *names):
    for name in names:
        file = tmp_path / "images" / name
        file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_give_way_up_to_a_limit_and_are_told(tmp_path, workers):
    section, told = folder(tmp_path, max_corrupt=2, workers=workers), notices()
    spoil(tmp_path, "cat/1.png", "eel/3.png")  # the last one gives way to the first
    data = open_data(section, SMALL)
    for _ in range(3):
        images, labels = next(batches := data.training(12, 0))
        assert len(images) == 12
        assert labels.bincount().tolist() == [5, 4, 3]
        batches.close()
    assert len(told) == 1
    assert "1.png" in told[0] or "3.png" in told[0]
    assert sum(len(labels) for _, labels in data.validation(5)) == 10
    spoil(tmp_path, "dog/0.png")
    with pytest.raises(InputError, match=r"data\.train: 3 images cannot be read.*\.png.*at most 2 of 12.*max_corrupt"):
        next(data.training(12, 0))
    with pytest.raises(InputError, match=r"data\.validation: 3 images"):
        list(data.validation(5))


def test_classes_without_validation_images_are_told(tmp_path):
    section, told = folder(tmp_path), notices()
    smaller = tmp_path / "validation" / "dog"
    shutil.copytree(tmp_path / "images" / "dog", smaller)
    section = msgspec.structs.replace(section, validation=str(smaller.parent))
    data = open_data(section, SMALL)
    assert told == ["data.validation has no images of 2 of the 3 classes: cat, eel"]
    assert [labels.tolist() for _, labels in data.validation(9)] == [[1] * 4]


def test_a_share_of_a_small_set_is_none_and_many_in_a_row_are_too_many(tmp_path):
    section = folder(tmp_path)
    spoil(tmp_path, "cat/1.png")
    with pytest.raises(InputError, match=r"an image cannot be read.*cat/1\.png.*at most 0 of 12"):
        next(open_data(section, SMALL).training(12, 0))
    spoil(tmp_path, *(f"{name}/{i}.png" for name in CLASSES for i in range(4) if (name, i) != ("cat", 1)))
    section = msgspec.structs.replace(section, max_corrupt=99)
    with pytest.raises(InputError, match="12 images cannot be read"):
        next(open_data(section, SMALL).training(12, 0))


def test_folder_training_is_the_same_for_any_workers_processes_and_starts(tmp_path):
    section = folder(tmp_path, repeated_augmentation=3)
    data = open_data(section, SMALL)
    whole = list(itertools.islice(data.training(6, 4), 5))
    with_workers = open_data(folder(tmp_path / "again", repeated_augmentation=3, workers=2), SMALL)
    for (a, x), (b, y) in zip(whole, with_workers.training(6, 4), strict=False):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    images, labels = next(data.training(6, 4, start_step=3))
    assert torch.equal(images, whole[3][0])
    for rank in range(2):
        images, labels = next(data.training(6, 4, rank=rank, world=2, start_step=4))
        assert torch.equal(images, whole[4][0][rank::2])
        assert torch.equal(labels, whole[4][1][rank::2])
    assert all(labels[i] == labels[i + 1] == labels[i + 2] for _, labels in whole for i in (0, 3))
    assert len({image.numpy().tobytes() for images, _ in whole for image in images}) > 15  # of 30, on flat colors
    counts = [sum(len(y) for _, y in data.validation(4, rank=rank, world=5)) for rank in range(5)]
    assert (sum(counts), max(counts)) == (12, 3)


def test_training_leaves_the_models_random_numbers_alone(tmp_path):
    data = open_data(folder(tmp_path, mixup=0.8), SMALL)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches = data.training(6, 0)
    for value in expected:
        next(batches)
        assert torch.rand(()) == value


def test_mixing_needs_an_even_share(tmp_path):
    data = open_data(folder(tmp_path, mixup=0.8), SMALL)
    with pytest.raises(InputError, match=r"even number.*6 images, 2 processes"):
        next(data.training(6, 0, rank=0, world=2))


def test_repeated_mixing_is_seeded_by_the_step(tmp_path):
    data = open_data(folder(tmp_path, mixup=0.8), SMALL)
    first, again = (list(itertools.islice(data.training(6, 1), 3)) for _ in range(2))
    later = next(data.training(6, 1, start_step=2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert torch.equal(later[0], first[2][0])
    assert not torch.equal(first[0][1], first[1][1])


def test_values_that_cannot_be_are_refused_by_the_recipe():
    with pytest.raises(RecipeError, match="max_corrupt"):
        DataSection(name="folder", max_corrupt=1.5)
    with pytest.raises(RecipeError, match="no folders"):
        DataSection(name="digits-in-the-wild", train="x")
    assert folder_data.Unreadable("x", 1000, 0.01)._allowed == 10


def test_the_folder_above_train_and_val_is_no_training_data(tmp_path):
    for split in ("train", "val"):
        make_folder(tmp_path / "data" / split)
    good = {"train": str(tmp_path / "data" / "train"), "validation": str(tmp_path / "data" / "val")}
    assert open_data(DataSection(name="folder", **good), SMALL).classes == CLASSES
    for key in good:
        with pytest.raises(InputError, match=r"parts of a data set.*got val, train.*data/val or .*data/train\.$"):
            open_data(DataSection(name="folder", **(good | {key: str(tmp_path / "data")})), SMALL)


def names_of(source):
    return {source.name(i) for i in range(len(source))}


def class_folder(root, counts):
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(png(shade(label, number)))
    return root


def test_a_share_of_every_class_is_held_out_always_the_same(tmp_path):
    counts = {"cat": 10, "dog": 25, "eel": 3, "fox": 1}
    source = Folder(class_folder(tmp_path / "a", counts))
    rest, held = source.split(0.2)
    assert rest.classes == held.classes == source.classes
    assert not names_of(rest) & names_of(held)
    assert names_of(rest) | names_of(held) == names_of(source)
    labels = [held.load(i)[1] for i in range(len(held))]
    assert [labels.count(label) for label in range(4)] == [2, 5, 1, 0]  # of three images one, of a single one none
    moved = shutil.copytree(tmp_path / "a", tmp_path / "b")
    there = {name.replace(str(tmp_path / "a"), str(moved)) for name in names_of(held)}
    assert names_of(Folder(moved).split(0.2)[1]) == there
    numbers = sorted(int(name.rpartition("/")[2].removesuffix(".png")) for name in names_of(held) if "/dog/" in name)
    assert numbers not in ([0, 1, 2, 3, 4], [20, 21, 22, 23, 24])  # neither the first nor the last
    for share, count in ((0.01, 1), (0.99, 24)):
        assert sum("/dog/" in name for name in names_of(source.split(share)[1])) == count


def test_an_added_image_moves_one_other_at_most(tmp_path):
    root = class_folder(tmp_path, {"cat": 40, "dog": 40})
    before = names_of(Folder(root).split(0.25)[1])
    for number in range(40, 44):
        (root / "cat" / f"{number}.png").write_bytes(png(0))
    after = names_of(Folder(root).split(0.25)[1])
    old = {name for name in after if int(name.rpartition("/")[2].removesuffix(".png")) < 40}
    assert len(before - after) <= 4
    assert len(old - before) <= 1
    assert {name for name in before if "/dog/" in name} <= after


def test_what_is_held_out_is_validated_on_and_not_trained_on(tmp_path):
    root, told = class_folder(tmp_path, {"cat": 8, "dog": 8}), notices()
    section = DataSection(
        name="folder", train=str(root), validation_share=0.25, workers=0, mixup=0, cutmix=0, auto_augment=None,
        color_jitter=0, random_erasing=0,
    )  # fmt: skip
    data = open_data(section, SMALL)
    assert told == ["data.validation_share: 4 of 16 images are validated on and not trained on"]

    def shades(batches):
        return [
            round(value) for images, _ in batches for value in ((images[:, 0, 8, 8] * 0.229 + 0.485) * 255).tolist()
        ]

    trained = shades(itertools.islice(data.training(6, 0), 4))  # two passes
    validated = shades(data.validation(3))
    assert sorted(validated + trained[:12]) == sorted(shade(*pair) for pair in itertools.product(range(2), range(8)))
    assert sorted(trained[:12]) == sorted(trained[12:])
    assert data.steps_per_epoch(6) == 2
    assert set(shades([(torch.from_numpy(data.calibration(99)), None)])) == set(trained)


def test_a_share_that_leaves_a_class_out_is_told(tmp_path):
    told = notices()
    section = DataSection(name="folder", train=str(class_folder(tmp_path, {"cat": 4, "dog": 1})), validation_share=0.5)
    open_data(section, SMALL)
    assert told[1:] == ["data.validation_share has no images of 1 of the 2 classes: dog"]


def test_what_no_share_can_be_held_out_of_is_refused(tmp_path):
    for make, word in ((make_tar, "held out of class folders"), (make_shards, "held out of class folders")):
        section = DataSection(name="folder", train=make(tmp_path / make.__name__), validation_share=0.5, num_classes=3)
        with pytest.raises(RecipeError, match=rf"data\.validation_share.*{word}.*Set data\.validation"):
            open_data(section, SMALL)
    single = class_folder(tmp_path / "single", {"cat": 1, "dog": 1})
    with pytest.raises(RecipeError, match=r"no class has a second image to hold out \(got 2 images, one per class\)"):
        open_data(DataSection(name="folder", train=str(single), validation_share=0.5), SMALL)


def test_without_images_to_validate_on_a_share_is_proposed(tmp_path):
    with pytest.raises(
        RecipeError, match=r"data\.validation: no folder.*--set data\.validation_share=0\.2 holds a fifth"
    ):
        open_data(DataSection(name="folder", train=make_folder(tmp_path / "a")), SMALL)


@pytest.mark.parametrize(("flip", "sides"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_images_are_mirrored_as_often_as_asked(flip, sides, tmp_path):
    picture = Image.new("RGB", (16, 16))
    picture.paste((255, 255, 255), (0, 0, 8, 16))  # white on the left
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            picture.save(tmp_path / name / f"{number}.png")
    section = DataSection(
        name="folder", train=str(tmp_path), validation=str(tmp_path), workers=0, mixup=0, cutmix=0, auto_augment=None,
        color_jitter=0, random_erasing=0, crop=(1.0, 1.0), flip=flip,
    )  # fmt: skip
    images, _ = next(open_data(section, SMALL).training(12, 0))
    assert set((images[:, 0, :, 2].mean(1) < images[:, 0, :, 13].mean(1)).tolist()) == sides


@pytest.mark.parametrize(
    "content", ['{"label": 1e400}', '{"label": 2.7}', '{"label": ' + "[" * 100_000, '{"label": [1]}']
)
def test_a_label_in_json_that_is_no_whole_number(content, tmp_path):
    with tarfile.open(tmp_path / "0000.tar", "w") as tar:
        add(tar, "1.png", png(9))
        add(tar, "1.json", content.encode())
    with pytest.raises(InputError, match=r"0000\.tar"):
        open_source(Place(f"wds/{tmp_path}", split="0000.tar", num_classes=9, target_key="label"))


def test_a_pipe_that_is_called_a_tar_file(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(InputError, match="neither a tar file"):
        open_source(Place(str(tmp_path / "a.tar")))
