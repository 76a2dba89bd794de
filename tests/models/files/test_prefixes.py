"""Names that begin alike, models inside larger ones, several models in a file, and how one of them is chosen."""

import pytest
import torch

from evit_deploy.errors import CheckpointError
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.models.files.prefixes import what_was_left, without_common
from evit_deploy.pipeline.convert import default_out
from evit_deploy.tokens.plan import TokenSpec
from tests.support.checkpoints import refusal, saved
from tests.support.layouts import owned
from tests.support.models import hollow, seeded


@pytest.fixture(scope="module")
def deit():
    return dict(seeded("deit_tiny_patch16_224", num_classes=5, img_size=64, depth=2).state_dict())


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def assert_same(checkpoint, weights):
    built = build_model(checkpoint).state_dict()
    assert built.keys() == weights.keys()
    assert all(torch.equal(built[name], weights[name]) for name in weights)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "module.model.", "net.encoder."])
def test_what_all_names_begin_with_is_taken_off(tmp_path, deit, prefix):
    checkpoint = read_checkpoint(saved(tmp_path, {"state_dict": under(prefix, deit)}))
    assert_same(checkpoint, deit)
    assert not any("left out" in note for note in checkpoint.notes)


def test_one_name_is_left_as_it_is():
    assert without_common({"a.b": torch.zeros(1)}).keys() == {"a.b"}
    assert without_common({"a.b": torch.zeros(1), "a.c": torch.zeros(1)}).keys() == {"b", "c"}
    assert without_common({"a.b": torch.zeros(1), "ab.c": torch.zeros(1)}).keys() == {"a.b", "ab.c"}


@pytest.mark.parametrize("prefix", ["backbone.", "visual.", "model.vision_model.", "anything."])
def test_a_model_inside_a_larger_one_is_found_and_said(tmp_path, deit, prefix):
    beside = {"loss.weight": torch.ones(2), "text.a.weight": torch.ones(2), "text.b.weight": torch.ones(2)}
    checkpoint = read_checkpoint(saved(tmp_path, under(prefix, deit) | beside))
    assert_same(checkpoint, deit)
    (note,) = [note for note in checkpoint.notes if "left out" in note]
    assert f"under {prefix!r}" in note
    assert "2 tensors of text" in note
    assert "loss.weight" in note


def test_a_layers_own_of_a_method_are_found_inside_too(tmp_path, deit):
    own = {"score_predictor.0.in_conv.0.weight": torch.ones(192)}
    checkpoint = read_checkpoint(saved(tmp_path, under("net.", deit | own) | {"loss.weight": torch.ones(2)}))
    assert list(checkpoint.method_weights) == list(own)


def test_a_classifier_beside_the_model_is_its_own_where_the_layout_says_so(tmp_path):
    weights = dict(owned("ViT").state_dict()) | {"loss.weight": torch.ones(2)}
    checkpoint = read_checkpoint(saved(tmp_path, {"state_dict": under("model.", weights)}))
    assert torch.equal(checkpoint.weights["head.weight"], weights["classifier.weight"])
    assert any(note.endswith("left out: loss.weight") for note in checkpoint.notes)


# Several models.


def dino(deit):
    backbone = {name: value for name, value in deit.items() if not name.startswith("head.")}
    head = {"head.mlp.0.weight": torch.ones(4, 192), "head.last_layer.weight_g": torch.ones(8, 1)}
    teacher = under("backbone.", backbone) | head
    student = under("module.", {name: value + 1 for name, value in teacher.items()})
    return backbone, {"student": student, "teacher": teacher, "epoch": 100}


def test_dino_is_its_teacher(tmp_path, deit):
    backbone, content = dino(deit)
    checkpoint = read_checkpoint(saved(tmp_path, content))
    assert_same(checkpoint, backbone)
    assert checkpoint.output == "embedding"
    assert any("teacher" in note and "is used" in note for note in checkpoint.notes)
    assert any("2 tensors of head" in note for note in checkpoint.notes)


def test_dino_in_a_released_size_has_the_preprocessing_of_dino(tmp_path):
    backbone = hollow("vit_small_patch16_224", num_classes=0)
    content = {"teacher": under("backbone.", backbone) | {"head.last_layer.weight_g": torch.ones(8, 1)}}
    assert read_checkpoint(saved(tmp_path, content)).model == "vit_small_patch16_224.dino"
    assert read_checkpoint(saved(tmp_path, backbone)).model == "deit_small_patch16_224"


def test_a_part_of_a_file_is_chosen_by_its_name(tmp_path, deit):
    backbone, content = dino(deit)
    path = saved(tmp_path, content)
    student = read_checkpoint(f"{path}#student")
    assert_same(student, {name: value + 1 for name, value in backbone.items()})
    assert student.sha256 == read_checkpoint(path).sha256
    assert default_out(student, TokenSpec(0.7)).name == "weights-student-evit-k0.7"
    assert_same(read_checkpoint(f"{path}#teacher.backbone"), backbone)
    with pytest.raises(CheckpointError, match=r"no tensors under 'other'.*backbone.*after '#'"):
        read_checkpoint(f"{path}#other")


def test_a_file_whose_name_has_the_mark_is_that_file(tmp_path, deit):
    assert_same(read_checkpoint(saved(tmp_path, deit, "weights#1.pth")), deit)


def test_student_and_teacher_in_one_set(tmp_path, deit):
    both = under("student.backbone.", {name: value + 1 for name, value in deit.items()})
    both |= under("teacher.backbone.", deit)
    checkpoint = read_checkpoint(saved(tmp_path, {"model": both}))
    assert_same(checkpoint, deit)
    (note,) = [note for note in checkpoint.notes if "several models" in note]
    assert "'teacher.backbone.' is used and not 'student.backbone.'" in note


def test_several_models_of_which_none_is_meant(tmp_path, deit):
    path = saved(tmp_path, under("left.", deit) | under("right.", {name: value + 1 for name, value in deit.items()}))
    message = refusal(path)
    assert "several models" in message
    assert "'left.', 'right.'" in message
    assert f"{path.name}#left" in message
    assert_same(read_checkpoint(f"{path}#right"), {name: value + 1 for name, value in deit.items()})


def test_what_was_left_is_counted_by_what_it_belongs_to():
    assert what_was_left(["../a.x", "../a.y", "/b.c.x"]) == "2 tensors of a, b.c.x"
