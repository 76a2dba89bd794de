"""Training: setup, fit, evaluate; the dense model first if the recipe says so, then the one with its tokens reduced."""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evit_deploy.backbones import backbone_of
from evit_deploy.checkpoint import Checkpoint, build_model, check_model_name, read_checkpoint, save_checkpoint
from evit_deploy.compare import compare, with_method
from evit_deploy.curriculum import Curriculum, advance, follow
from evit_deploy.data import Preprocess
from evit_deploy.errors import InputError, RecipeError, StageError
from evit_deploy.recipe import ModelSection, Recipe, TrainSection
from evit_deploy.report import Report
from evit_deploy.tokens.plan import TokenPlan, TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, set_keep_rate_, token_plan
from evit_deploy.training_data import TrainingData, curriculum_of, open_data

DENSE, EVIT = "dense.safetensors", "evit.safetensors"

Tell = Callable[[str], None]


class TrainResult(msgspec.Struct, frozen=True):
    """What training left behind.

    Args:
        checkpoint: The fine-tuned weights, ``evit.safetensors``.
        dense: The dense weights that fine-tuning started from, ``dense.safetensors``.
        plan: Token counts of the fine-tuned model.
        report: The comparison, one accuracy row a model.
        cpu_seconds: Processor time by stage: ``dense`` (if trained), ``finetune``, ``compare``.
    """

    checkpoint: Path
    dense: Path
    plan: TokenPlan
    report: Report
    cpu_seconds: dict[str, float]


def train(
    recipe: Recipe, out: str | Path, *, progress: Tell | None = None, notice: Tell | None = None, device: str = "auto"
) -> TrainResult:
    """Trains as a recipe says and writes ``dense.safetensors`` and ``evit.safetensors``, each whole or not at all.

    Files of the same names in ``out`` are replaced. On a CPU the same recipe gives the same weights every time, as long
    as the number of threads stays the same.

    Args:
        recipe: What to do.
        out: Folder for the checkpoints; made if it is missing.
        progress: Told what is being done now, about a hundred times a stage.
        notice: Told what the user should know, such as the learning rate that results from the batch size.
        device: PyTorch device; ``auto`` takes a GPU if there is one.

    Raises:
        InputError: The checkpoint, the images or the token spec cannot be used; nothing has been trained.
        StageError: The loss is no longer finite, or a file cannot be written.
    """
    out, notice = Path(out), _silent if notice is None else notice
    if out.exists() and not out.is_dir():
        raise InputError("this is a file", where=out, wanted="a folder for the checkpoints")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    _seed(recipe.seed)
    model, checkpoint, data = setup(recipe, notice)
    model.to(device)
    evit, dense = out / EVIT, out / DENSE
    cpu_seconds = {}

    if recipe.dense is not None:
        start = time.process_time()
        fit(
            model, data, recipe.dense, seed=recipe.seed, stage="dense", progress=progress, notice=notice,
            curriculum=curriculum_of(data),
        )  # fmt: skip
        cpu_seconds["dense"] = time.process_time() - start
    evit.unlink(missing_ok=True)  # an earlier run's must not stand beside this run's dense weights
    save_checkpoint(dense, model, checkpoint)
    dense_model = copy.deepcopy(model)

    start = time.process_time()
    reduce_tokens_(model, recipe.tokens)
    _seed(recipe.seed + 1)
    fit(model, data, recipe.finetune, seed=recipe.seed + 1, stage="finetune", progress=progress, notice=notice)
    cpu_seconds["finetune"] = time.process_time() - start
    save_checkpoint(evit, model, msgspec.structs.replace(checkpoint, tokens=recipe.tokens))

    start = time.process_time()
    rows = compare(dense_model, model, data, recipe.compare, recipe.data.evaluation_batch_size, progress)
    cpu_seconds["compare"] = time.process_time() - start
    return TrainResult(evit, dense, token_plan(model), Report(accuracy=tuple(rows)), cpu_seconds)


def setup(recipe: Recipe, notice: Tell | None = None) -> tuple[nn.Module, Checkpoint, TrainingData]:
    """Builds the dense model and opens the data; refuses what could only fail after hours of training.

    Args:
        recipe: What to do.
        notice: Told what was assumed or changed.

    Returns:
        The dense model with a classifier for the data's classes, what is to be written beside its weights, the data.

    Raises:
        InputError: See :func:`train`.
    """
    section, notice = recipe.model, _silent if notice is None else notice
    if section.checkpoint is None and section.name is None:
        fix = "Say --set model.checkpoint=FILE, --set model.name=TIMM_NAME or both."
        raise RecipeError("no model given", where="model", fix=fix)
    if section.checkpoint is None and recipe.dense is not None:
        assert section.name is not None
        model, data = _from_scratch(recipe, notice)
        checkpoint = Checkpoint(section.name, None, {}, section.name, dict(section.args))
    else:
        model, checkpoint, data = _from_checkpoint(recipe, notice)
    height, width = backbone_of(model).image_size(model)
    checkpoint.model_args |= {
        "num_classes": len(data.classes),
        "img_size": height if height == width else [height, width],
    }
    checkpoint.preprocess, checkpoint.labels = data.preprocess, list(data.classes)
    checkpoint.weights, checkpoint.tokens = {}, None
    for section_name in ("dense", "finetune"):
        run = getattr(recipe, section_name)
        if run is not None:
            data.steps_per_epoch(run.batch_size)
    for method in (*recipe.compare.baselines, recipe.tokens.method):
        reduce_tokens_(model, with_method(recipe.tokens, method))
    reduce_tokens_(model, TokenSpec(keep_rate=1.0))
    return model, checkpoint, data


def _from_scratch(recipe: Recipe, notice: Tell) -> tuple[nn.Module, TrainingData]:
    import timm

    section = recipe.model
    assert section.name is not None
    check_model_name(section.name, where="model.name")
    cfg = timm.get_pretrained_cfg(section.name)
    preprocess = Preprocess.from_model(cfg.to_dict() if cfg else {}, section.image_size)
    data = open_data(recipe.data, preprocess, notice)
    try:
        model = timm.create_model(
            section.name, pretrained=False, num_classes=len(data.classes), img_size=preprocess.size, **section.args
        )
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise RecipeError(f"timm cannot build {section.name!r}: {error}", where="model", seen=section.args) from error
    if section.init == "scaled":
        scaled_init_(model)
    return model, data


def _from_checkpoint(recipe: Recipe, notice: Tell) -> tuple[nn.Module, Checkpoint, TrainingData]:
    section: ModelSection = recipe.model
    if section.init != "timm":
        raise RecipeError("init has no effect on a model that starts from trained weights", where="model.init")
    source = section.checkpoint or section.name
    assert source is not None
    checkpoint = read_checkpoint(source, section.name)
    for note in checkpoint.notes:
        notice(note)
    checkpoint = msgspec.structs.replace(checkpoint, model_args=checkpoint.model_args | section.args)
    model: Any = build_model(checkpoint, section.image_size)
    size = backbone_of(model).image_size(model)
    preprocess = checkpoint.preprocess or Preprocess.from_model(model)
    data = open_data(recipe.data, msgspec.structs.replace(preprocess, size=size), notice)
    if model.num_classes != len(data.classes) or checkpoint.labels not in (None, list(data.classes)):
        notice(
            f"the classifier begins anew: the data has {len(data.classes)} classes that the checkpoint does not know"
        )
        model.reset_classifier(len(data.classes))
    if checkpoint.tokens not in (None, recipe.tokens):
        notice(f"the recipe's token reduction replaces the checkpoint's own: {checkpoint.tokens}")
    return model, checkpoint, data


def scaled_init_(model: Any) -> None:
    """First weights that learn several times faster than timm's on small data, in place.

    Xavier for the blocks' linear layers, the last of each residual branch divided by √(2·depth), and position
    embeddings with a standard deviation of 0.1.
    """
    blocks = backbone_of(model).blocks(model)
    for name, layer in blocks.named_modules():
        if isinstance(layer, nn.Linear):
            last = name.endswith(("attn.proj", "mlp.fc2"))
            nn.init.xavier_uniform_(layer.weight, gain=(2 * len(blocks)) ** -0.5 if last else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.trunc_normal_(model.pos_embed, std=0.1)


def fit(
    model: nn.Module,
    data: TrainingData,
    section: TrainSection,
    *,
    seed: int = 0,
    stage: str = "finetune",
    progress: Tell | None = None,
    notice: Tell | None = None,
    curriculum: Curriculum | None = None,
) -> list[float]:
    """Trains a model in place, on the device it is on; leaves it in evaluation mode at its full token reduction.

    Args:
        model: Dense, or reduced by ``reduce_tokens_``.
        data: Where batches come from.
        section: How to train.
        seed: Where the order and the variation of the images start.
        stage: Name of this run in messages.
        progress: Told what is being done now.
        notice: Told the length and the learning rate before the first step.
        curriculum: How hard images are, for a model that begins from nothing; without one at full difficulty.

    Returns:
        The loss of every step.

    Raises:
        StageError: The loss or a gradient is no longer finite.
    """
    per_epoch = data.steps_per_epoch(section.batch_size)
    steps = section.steps or max(1, round((section.epochs or 1) * per_epoch))
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        parameter_groups(model, section.weight_decay), lr=0.0, betas=section.betas, fused=device.type in ("cpu", "cuda")
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=section.autocast == "bf16")
    if notice is not None:
        notice(f"{stage}: {steps} steps ({steps / per_epoch:.3g} epochs) on {device.type}, {_rate_text(section)}")
    batches, losses = follow(curriculum, data, section.batch_size, seed), []
    model.train(section.model_mode == "train")
    try:
        with _threads(section.threads):
            for step in range(steps):
                plan = _advance_keep_rate_(model, step, steps, section)
                rate = learning_rate(section, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                images, targets = (tensor.to(device, non_blocking=True) for tensor in next(batches))
                with autocast:
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=section.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), section.clip or math.inf)
                losses.append(loss.item())
                advance(curriculum, logits, targets)
                _check_finite(losses[-1], norm, stage, step, rate)
                optimizer.step()
                if progress is not None and (step % max(1, steps // 100) == 0 or step == steps - 1):
                    tokens = plan.blocks[-1].tokens_out
                    progress(f"{stage}: step {step + 1} of {steps}, loss {losses[-1]:.3f}, {tokens} tokens at the end")
    finally:  # also a run that broke off leaves the model at the rate it was asked for
        set_keep_rate_(model, 1.0)
        model.eval()
    return losses


def _advance_keep_rate_(model: nn.Module, step: int, steps: int, section: TrainSection) -> TokenPlan:
    length = section.keep_rate_schedule * steps
    return set_keep_rate_(model, step / length if step < length else 1.0) if step <= length else token_plan(model)


def _check_finite(loss: float, norm: Tensor, stage: str, step: int, rate: float) -> None:
    if not math.isfinite(loss) or not math.isfinite(norm.item()):
        raise StageError(
            "the loss is no longer finite" if not math.isfinite(loss) else "a gradient is no longer finite",
            where=f"{stage}, step {step + 1}",
            seen=f"loss {loss:.3g} at learning rate {rate:.3g}",
            fix=f"Lower {stage}.learning_rate, lengthen {stage}.warmup or set {stage}.clip.",
        )


def learning_rate(section: TrainSection, step: int, steps: int) -> float:
    """The learning rate of a step: a line up to the highest, then a cosine down to the lowest.

    Args:
        section: How to train.
        step: 0 to ``steps`` - 1.
        steps: Length of the run.
    """
    highest, lowest = section.effective_learning_rate, section.min_learning_rate
    warmup = round(section.warmup * steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: weights with decay; biases, norms, position embeddings and prefix tokens without."""
    never = set(getattr(model, "no_weight_decay", set)())
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or name in never else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _rate_text(section: TrainSection) -> str:
    text = f"batch {section.batch_size}, learning rate {section.effective_learning_rate:.4g}"
    if section.learning_rate_batch is None:
        return text
    return f"{text} = {section.learning_rate:g} × {section.batch_size} / {section.learning_rate_batch}"


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)  # timm's augmentations draw from here
    np.random.seed(seed % 2**32)  # and from here


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _silent(_: str) -> None:
    pass
