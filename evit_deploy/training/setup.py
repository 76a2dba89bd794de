"""Builds the model, data and teacher of a recipe, with early checks for what would fail after hours of training."""

import copy
import fnmatch
import logging
from typing import Any

import msgspec
from torch import nn

from evit_deploy.data.labels import same_classes
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.training_data import TrainingData, open_data
from evit_deploy.errors import RecipeError, did_you_mean
from evit_deploy.models.checkpoint import Checkpoint, build_model, read_checkpoint
from evit_deploy.models.create import create_model
from evit_deploy.models.identify import check_model_name
from evit_deploy.models.preprocessing import resolve_inputs
from evit_deploy.recipe.recipe import Recipe
from evit_deploy.recipe.sections import DynamicViTSection, ModelSection, TeacherSection, TrainSection
from evit_deploy.registry import METHODS
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_label, token_plan
from evit_deploy.tokens.state import TokenBlocks
from evit_deploy.training.compare import with_method
from evit_deploy.training.tasks import Teacher
from evit_deploy.training.token_labels import has_token_classifier

_LOG = logging.getLogger(__name__)


def setup(recipe: Recipe) -> tuple[nn.Module, Checkpoint, TrainingData]:
    """Builds the dense model and opens the data; checks early what would otherwise fail after hours of training.

    Args:
        recipe: The recipe.

    Returns:
        The dense model with a classifier for the data's classes, a checkpoint with its metadata, and the data.

    Raises:
        InputError: See :func:`train`.
    """
    section = recipe.model
    _check_token_label_sources(recipe)
    if section.checkpoint is None and section.name is None:
        fix = "Say --set model.checkpoint=FILE, --set model.name=TIMM_NAME or both."
        raise RecipeError("no model given", where="model", fix=fix)
    if section.checkpoint is None and (recipe.dense is not None or not section.pretrained):
        assert section.name is not None
        model, data = _from_scratch(recipe)
        checkpoint = Checkpoint(section.name, None, {}, section.name, dict(section.args))
    else:
        model, checkpoint, data = _from_checkpoint(recipe)
    for stage in _with_token_labels(recipe):
        if not has_token_classifier(model):
            raise RecipeError(
                "the model has no classifier on every token", where=f"{stage}.token_labels", seen=type(model).__name__,
                fix=f"Take an LV-ViT (model.name=lvvit_s), or set {stage}.token_labels=null.",
            )  # fmt: skip
    height, width = backbone_of(model).image_size(model)
    checkpoint.model_args.pop("projection", None)  # replaced by a new classifier
    checkpoint.model_args |= {
        "num_classes": len(data.classes),
        "img_size": height if height == width else [height, width],
    }
    checkpoint.preprocess, checkpoint.labels = data.preprocess, list(data.classes)
    checkpoint.weights, checkpoint.tokens = {}, None
    for section_name in ("dense", "finetune"):
        run = getattr(recipe, section_name)
        if run is not None:
            data.steps_per_epoch(run.images_per_step())
    for method in (*recipe.compare.baselines, recipe.tokens.method):
        reduce_tokens_(model, with_method(recipe.tokens, method))
    _check_parts(recipe, model)
    reduce_tokens_(model, TokenSpec(keep_rate=1.0))
    return model, checkpoint, data


def _check_parts(recipe: Recipe, model: nn.Module) -> None:
    """Checks the settings that refer to parts of the model."""
    names = {name for name, _ in model.named_parameters()}
    own = METHODS.get(recipe.tokens.method).own_parameters
    for stage in ("dense", "finetune"):
        run: TrainSection | None = getattr(recipe, stage)
        if run is None:
            continue
        if run.token_labels is not None and stage == "finetune" and isinstance(model.blocks, TokenBlocks):
            raise RecipeError(
                "token labels need tokens that are patches, but this method merges or sets aside patches",
                where="finetune.token_labels", seen=token_label(recipe.tokens),
                fix="Set finetune.token_labels=null, or take tokens.method=evit without squeeze and sized.",
            )  # fmt: skip
        strange = next((pattern for pattern in run.frozen if not fnmatch.filter(names, pattern)), None)
        if strange is not None:
            raise RecipeError(
                "no such parameter", where=f"{stage}.frozen", seen=strange, fix=did_you_mean(strange, sorted(names))
            )
        if all(map(run.freezes, names)):
            raise RecipeError(
                "all parameters would stand still", where=f"{stage}.frozen", seen=", ".join(run.frozen),
                fix="Leave at least one parameter out.",
            )  # fmt: skip
        if (run.backbone_lr_scale, run.backbone_frozen_epochs) != (1.0, 0.0) and (stage == "dense" or not own):
            raise RecipeError(
                "this method adds no layers, so there is only the backbone",
                where=f"{stage}.backbone_lr_scale, backbone_frozen_epochs", seen=recipe.tokens.method,
                fix="Leave both out.",
            )  # fmt: skip


def _check_own_teacher(recipe: Recipe) -> None:
    """Refuses dense weights with an untrained classifier as DynamicViT's teacher."""
    if recipe.tokens.method != "dynamicvit" or recipe.teacher is not None or recipe.dense is not None:
        return
    how = recipe.finetune.dynamicvit or DynamicViTSection()
    if how.logits_weight or how.tokens_weight:
        raise RecipeError(
            "the dense weights do not know the data's classes, and dynamicvit learns from them",
            where="model.checkpoint",
            fix="Train the dense model on the data first (a dense section), give a teacher of kind dense that knows "
            "them, or set finetune.dynamicvit={logits_weight: 0, tokens_weight: 0}.",
        )  # fmt: skip


def _with_token_labels(recipe: Recipe) -> list[str]:
    runs = {"dense": recipe.dense, "finetune": recipe.finetune}
    return [stage for stage, run in runs.items() if run is not None and run.token_labels is not None]


def _check_token_label_sources(recipe: Recipe) -> None:
    """Checks that token labels have a source. Not done when a recipe is read, since ``--set`` may add the folder."""
    taught = recipe.teacher is not None and recipe.teacher.kind == "token_labels"
    for stage in _with_token_labels(recipe):
        if recipe.data.token_labels is None and not (taught and stage == "finetune"):
            fix = "Give --set data.token_labels=FOLDER"
            fix += (
                ", or a teacher of kind token_labels." if stage == "finetune" else "; the teacher is finetune's alone."
            )
            raise RecipeError("no token labels given", where=f"{stage}.token_labels", fix=fix)


def _from_scratch(recipe: Recipe) -> tuple[nn.Module, TrainingData]:
    section = recipe.model
    assert section.name is not None
    check_model_name(section.name, where="model.name")
    chosen = resolve_inputs(section.name, None, None, None, section.preprocess, chosen=True).preprocess
    side = section.image_size
    preprocess = chosen if side is None else msgspec.structs.replace(chosen, size=(side, side))
    data = open_data(recipe.data, preprocess)
    try:
        own = {"num_classes": len(data.classes), "img_size": preprocess.size}
        model = create_model(section.name, own | section.args)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise RecipeError(f"timm cannot build {section.name!r}: {error}", where="model", seen=section.args) from error
    if section.init == "scaled":
        scaled_init_(model)
    return model, data


def _from_checkpoint(recipe: Recipe) -> tuple[nn.Module, Checkpoint, TrainingData]:
    section: ModelSection = recipe.model
    if section.init != "timm":
        raise RecipeError("init has no effect on a model that starts from trained weights", where="model.init")
    source = section.checkpoint or section.name
    assert source is not None
    checkpoint = read_checkpoint(source, section.name, section.preprocess)
    for note in checkpoint.notes:
        _LOG.warning(note)
    checkpoint = msgspec.structs.replace(checkpoint, model_args=checkpoint.model_args | section.args)
    model: Any = build_model(checkpoint, section.image_size)
    size = backbone_of(model).image_size(model)
    preprocess = checkpoint.preprocess
    assert preprocess is not None  # set by read_checkpoint
    data = open_data(recipe.data, msgspec.structs.replace(preprocess, size=size))
    known = checkpoint.labels is None or same_classes(checkpoint.labels, data.classes)
    if model.num_classes != len(data.classes) or not known:
        _LOG.warning(
            f"a new classifier is trained: the data has {len(data.classes)} classes that the checkpoint does not know"
        )
        model.reset_classifier(len(data.classes))
        _check_own_teacher(recipe)
    if checkpoint.tokens not in (None, recipe.tokens):
        _LOG.warning(f"the recipe's token reduction replaces the checkpoint's own: {checkpoint.tokens}")
    return model, checkpoint, data


def scaled_init_(model: Any) -> None:
    """Initializes weights in place so that they learn several times faster than timm's on small data.

    Xavier initialization for the blocks' linear layers, with the last of each residual branch divided by √(2·depth),
    and position embeddings with a standard deviation of 0.1.
    """
    blocks = backbone_of(model).blocks(model)
    for name, layer in blocks.named_modules():
        if isinstance(layer, nn.Linear):
            last = name.endswith(("attn.proj", "mlp.fc2"))
            nn.init.xavier_uniform_(layer.weight, gain=(2 * len(blocks)) ** -0.5 if last else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.trunc_normal_(model.pos_embed, std=0.1)


def open_teacher(recipe: Recipe, model: nn.Module, preprocess: Preprocess) -> Teacher | None:
    """Opens the teacher of a recipe, frozen, on the student's device.

    Args:
        recipe: The recipe.
        model: The student. Its ``pretrained_cfg`` gets the normalization of ``preprocess``, because the teacher may
            use another.
        preprocess: Preprocessing of the student.

    Raises:
        CheckpointError: The teacher cannot be read.
        RecipeError: Teacher and student do not match.
    """
    section, student = recipe.teacher, model
    if section is None:
        return None
    source = section.checkpoint or section.name
    assert source is not None
    checkpoint = read_checkpoint(source, section.name)
    teacher: Any = build_model(checkpoint, preprocess.size[0])
    if teacher.num_classes != student.num_classes:
        raise RecipeError(
            "the teacher has different classes", where="teacher", seen=teacher.num_classes, wanted=student.num_classes
        )
    if section.kind == "token" and not hasattr(student, "set_distilled_training"):
        raise RecipeError(
            "the student has no distillation token", where="teacher.kind", seen="token",
            fix="Take a distilled model (deit_small_distilled_patch16_224), or teacher.kind=logits.",
        )  # fmt: skip
    if section.kind == "token" and recipe.finetune.model_mode == "eval":
        raise RecipeError(
            "in evaluation mode the outputs of the two heads are not separate", where="finetune.model_mode",
            fix="Set finetune.model_mode=train.",
        )  # fmt: skip
    if section.kind == "dense":
        _check_dense_teacher(teacher, student, checkpoint.tokens)
    if section.kind == "token_labels":
        _check_labeling_teacher(teacher, checkpoint.tokens)
    elif checkpoint.tokens is not None:
        reduce_tokens_(teacher, checkpoint.tokens)
    return _taught(teacher, checkpoint.preprocess or Preprocess.from_model(teacher), student, preprocess, section)


def own_teacher(recipe: Recipe, model: nn.Module, dense: nn.Module | None, preprocess: Preprocess) -> Teacher | None:
    """Returns the initial dense model as the teacher, for methods that learn from it; otherwise ``None``.

    Args:
        recipe: The recipe.
        model: The student, with its tokens reduced.
        dense: The dense model that it starts from.
        preprocess: Preprocessing of both.
    """
    if not METHODS.get(recipe.tokens.method).learns_from_dense or not token_plan(model).locations:
        return None
    if dense is None:
        _LOG.warning(f"no dense weights to learn from: {recipe.tokens.method} learns from the labels alone")
        return None
    return _taught(copy.deepcopy(dense), preprocess, model, preprocess, None)


def _taught(
    teacher: Any, theirs: Preprocess, student: Any, ours: Preprocess, section: TeacherSection | None
) -> Teacher:
    for which, how in ((student, ours), (teacher, theirs)):
        which.pretrained_cfg = dict(which.pretrained_cfg or {}) | {"mean": how.mean, "std": how.std}
    teacher.to(next(student.parameters()).device).eval().requires_grad_(False)
    return Teacher(teacher, section)


def _check_dense_teacher(teacher: Any, student: Any, tokens: TokenSpec | None) -> None:
    where = "teacher.kind=dense"
    if tokens is not None:
        raise RecipeError("the teacher drops tokens", where=where, seen=tokens, fix="Take its dense weights.")
    forms = [
        f"{type(model).__name__}, width {model.embed_dim}, {model.patch_embed.num_patches} patches"
        for model in (teacher, student)
    ]
    if forms[0] != forms[1]:
        raise RecipeError("the teacher has a different architecture", where=where, seen=forms[0], wanted=forms[1])


def _check_labeling_teacher(teacher: Any, tokens: TokenSpec | None) -> None:
    where = "teacher.kind=token_labels"
    if not has_token_classifier(teacher):
        raise RecipeError(
            "the teacher has no classifier on every token", where=where, seen=type(teacher).__name__,
            wanted="an LV-ViT",
        )  # fmt: skip
    if tokens is not None:
        raise RecipeError(
            "the teacher drops tokens and has no output for those patches", where=where, seen=tokens,
            fix="Take its dense weights.",
        )  # fmt: skip
