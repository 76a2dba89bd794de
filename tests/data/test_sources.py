"""Images from class folders, tar files, WebDataset shards and Hugging Face datasets, and what is wrong with them."""

import io
import itertools
import json
import re
import shutil
import tarfile

import msgspec
import pytest
import torch
from PIL import Image

from evit_deploy.data import folder as folder_data
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources import Place, _expanded, open_source
from evit_deploy.data.training_data import open_data
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
        (Place("wds/{root}", target_key="name", num_classes=3), "no label can be read.*an integer"),
        (Place("wds/{root}", target_key="none", num_classes=3), "no label can be read"),
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
    assert len({image.numpy().tobytes() for images, _ in whole for image in images}) > 15  # of 30, on flat colours
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
