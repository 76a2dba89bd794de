"""Training of a recipe: the dense model if it has a ``dense`` section, fine-tuning with reduced tokens, comparison."""

import copy
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from evit_deploy import progress
from evit_deploy.data.training.curriculum import Curriculum
from evit_deploy.data.training.sampling import worker_deaths_told
from evit_deploy.data.training.training_data import TrainingData, curriculum_of
from evit_deploy.errors import InputError, Interrupted, StageError
from evit_deploy.models.checkpoint import save_checkpoint
from evit_deploy.models.levit import EvoLeViT
from evit_deploy.recipe.recipe import Recipe
from evit_deploy.recipe.sections import TrainSection
from evit_deploy.report.report import AccuracyRow, Report
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.tokens.reduce import reduce_tokens_, set_keep_rate_, token_plan
from evit_deploy.training.compare import DENSE_NAME, compare, evaluate, finetuned_name
from evit_deploy.training.log import TrainingLog
from evit_deploy.training.schedules import backbone_rate_scale, is_layer_wise, keep_rate_progress, learning_rate
from evit_deploy.training.setup import open_teacher, own_teacher, setup
from evit_deploy.training.state import StateFile, interruptible, state_path
from evit_deploy.training.step import StepResult, TrainingRun
from evit_deploy.training.tasks import Teacher

_LOG = logging.getLogger(__name__)

DENSE, EVIT = "dense.safetensors", "evit.safetensors"
LATE = 1
"""Steps that stay queued when a result is read, so that the device is never idle meanwhile."""
PROGRAMS = 256
"""Limit of compiled programs. A run compiles two, but PyTorch counts all models of a class together, and its default
limit is eight."""


class TrainResult(msgspec.Struct, frozen=True):
    """Result of :func:`train`.

    Args:
        checkpoint: The fine-tuned weights, ``evit.safetensors``.
        dense: The dense weights that fine-tuning started from, ``dense.safetensors``; ``None`` if the reduced model was
            trained from scratch.
        plan: Token counts of the fine-tuned model.
        report: The comparison, with one accuracy row per model.
        cpu_seconds: CPU time by stage: ``dense`` (if trained), ``finetune``, ``compare``.
    """

    checkpoint: Path
    dense: Path | None
    plan: TokenPlan
    report: Report
    cpu_seconds: dict[str, float]


class Stage(msgspec.Struct, frozen=True):
    """One training stage of a recipe, with the files that it writes.

    Args:
        name: Name in messages.
        state: File to resume an interrupted run from; ``None`` saves no state.
        log: Log of the steps.
    """

    name: str
    state: StateFile | None = None
    log: TrainingLog | None = None


FINETUNE = Stage("finetune")


@worker_deaths_told()
def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    dense_saved: Callable[[Path], None] | None = None,
) -> TrainResult:
    """Trains the models of a recipe and writes ``dense.safetensors`` and ``evit.safetensors``, each atomically.

    Existing files of these names in ``out`` are replaced. On a CPU the same recipe with the same number of threads
    always gives the same weights, even if the run was interrupted and resumed. When started by ``accelerate launch`` or
    ``torchrun``, the processes share the work.

    Args:
        recipe: The recipe.
        out: Folder for the checkpoints; created if missing. An interrupted run leaves ``<stage>.state`` there.
        resume: Whether to continue an interrupted run of the same recipe; if it saved nothing, the run starts from the
            beginning.
        device: PyTorch device; ``auto`` uses a GPU if there is one.
        dense_saved: Called with the path of ``dense.safetensors`` once it is written, before fine-tuning starts.

    Raises:
        InputError: The checkpoint, the images or the token spec cannot be used, or ``out`` has an interrupted run and
            ``resume`` is false; nothing was trained.
        StageError: The loss is no longer finite, a batch does not fit into memory, a process that reads images died, or
            a file cannot be written.
        Interrupted: Ctrl-C or SIGTERM; the state was saved for ``resume``.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError("this is a file", where=out, wanted="a folder for the checkpoints")
    processes = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    files = {stage: StateFile(state_path(out, stage), recipe, stage) for stage in ("dense", "finetune")}
    stages = progress.stages(3 if recipe.dense is not None else 2)
    with _first_process_logs(processes), stages, _naming_what_was_saved(files), _logged(out, recipe) as logs:
        _check_interrupted(files, resume)
        return _train(recipe, out, files, logs, device, dense_saved)


@contextmanager
def _naming_what_was_saved(files: dict[str, StateFile]) -> Iterator[None]:
    """Adds the path of the saved state to an interrupt that happens outside the training loop."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        saved = [file.path for file in files.values() if file.path.exists()]
        if not saved:
            raise
        raise Interrupted(f"what was saved last is {saved[-1]}") from None


@contextmanager
def _first_process_logs(processes: PartialState) -> Iterator[None]:
    """Lets only the first of several processes log; errors are logged by all."""
    log = logging.getLogger("evit_deploy")
    level = log.level
    if not processes.is_main_process:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _train(
    recipe: Recipe,
    out: Path,
    files: dict[str, StateFile],
    logs: dict[str, TrainingLog],
    device: str,
    dense_saved: Callable[[Path], None] | None,
) -> TrainResult:
    processes = PartialState()
    where = processes.device if device == "auto" else torch.device(device)
    _seed(recipe.seed)
    model, checkpoint, data = setup(recipe)
    model.to(where)
    teacher = open_teacher(recipe, model, data.preprocess)
    evit, dense = out / EVIT, out / DENSE
    common: dict[str, Any] = {"evaluation_batch_size": recipe.data.evaluation_batch_size}
    cpu_seconds = {}

    if recipe.dense is not None:
        progress.stage(_LOG, "training the dense model")
        start = time.process_time()
        fit(
            model, data, recipe.dense, seed=recipe.seed, stage=Stage("dense", files["dense"], logs.get("dense")),
            curriculum=curriculum_of(data), **common,
        )  # fmt: skip
        cpu_seconds["dense"] = time.process_time() - start
    if processes.is_main_process:
        evit.unlink(missing_ok=True)  # the result of an earlier run does not belong to this run's dense weights
    dense_model = None
    if recipe.starts_from_weights:
        dense_model = copy.deepcopy(model)
        if processes.is_main_process:
            save_checkpoint(dense, model, checkpoint)
            if dense_saved is not None:
                dense_saved(dense)

    progress.stage(_LOG, "training with tokens reduced")
    start = time.process_time()
    reduce_tokens_(model, recipe.tokens)
    teacher = teacher or own_teacher(recipe, model, dense_model, data.preprocess)
    _seed(recipe.seed + 1)
    fit(
        model, data, recipe.finetune, seed=recipe.seed + 1,
        stage=Stage("finetune", files["finetune"], logs.get("finetune")), teacher=teacher,
        curriculum=None if recipe.starts_from_weights else curriculum_of(data), **common,
    )  # fmt: skip
    cpu_seconds["finetune"] = time.process_time() - start
    if processes.is_main_process:
        save_checkpoint(evit, model, msgspec.structs.replace(checkpoint, tokens=recipe.tokens))

    progress.stage(_LOG, "comparing")
    start = time.process_time()
    rows = compare(dense_model, model, data, recipe.compare, recipe.data.evaluation_batch_size)
    cpu_seconds["compare"] = time.process_time() - start
    _note_results(logs, {"dense": DENSE_NAME, "finetune": finetuned_name(recipe.tokens)}, rows)
    if processes.is_main_process:
        for file in files.values():
            file.remove()
    report = Report(accuracy=tuple(rows))
    return TrainResult(evit, dense if dense_model is not None else None, token_plan(model), report, cpu_seconds)


def _note_results(logs: dict[str, TrainingLog], names: dict[str, str], rows: list[AccuracyRow]) -> None:
    """Adds the final accuracy to the log of each stage, and logs the curves of loss and accuracy."""
    top1 = {row.name: row.top1 for row in rows}
    for stage, log in logs.items():
        log.evaluated(top1[names[stage]])
        try:
            log.write()
        except StageError as error:
            _LOG.warning(f"the last row of the log could not be saved: {error}")
        for curve in (log.loss_curve(), log.curve()):
            if curve is not None:
                _LOG.info(curve)


def _check_interrupted(files: dict[str, StateFile], resume: bool) -> None:
    found = [file.path for file in files.values() if file.path.exists()]
    if resume and not found:
        out = next(iter(files.values())).path.parent
        _LOG.info(f"{out}: nothing was saved yet to continue from; the run starts from the beginning")
    if resume:
        for file in files.values():
            file.read()  # refuse the state of another recipe before the long work
    elif found:
        raise InputError(
            "there is an interrupted run here",
            where=found[-1],
            fix="Continue with --resume, or start again with --force.",
        )


@contextmanager
def _logged(out: Path, recipe: Recipe) -> Iterator[dict[str, TrainingLog]]:
    """Opens the logs of the stages; only in the first process."""
    stages = [stage for stage in ("dense", "finetune") if getattr(recipe, stage) is not None]
    logs = {stage: TrainingLog(out, stage) for stage in stages if PartialState().is_main_process}
    try:
        yield logs
    finally:
        for log in logs.values():
            log.close()


def fit(
    model: nn.Module,
    data: TrainingData,
    section: TrainSection,
    *,
    seed: int = 0,
    stage: Stage = FINETUNE,
    teacher: Teacher | None = None,
    evaluation_batch_size: int = 64,
    curriculum: Curriculum | None = None,
) -> list[float]:
    """Trains a model in place on its device. On return it is in evaluation mode and at its full token reduction.

    Args:
        model: Dense, or reduced by ``reduce_tokens_``.
        data: Source of the batches.
        section: Settings of the training.
        seed: Seed for the order and augmentation of the images.
        stage: Name in messages, state file and log.
        teacher: Teacher to learn from, in addition to the labels.
        evaluation_batch_size: Images per batch in evaluations during training.
        curriculum: Difficulty of the images, for a model trained from scratch; ``None`` is full difficulty.

    Returns:
        The loss of every step.

    Raises:
        InputError: The state belongs to another run.
        StageError: The loss or a gradient was not finite a second time, after returning to the last good state; or a
            batch does not fit into memory.
        KeyboardInterrupt: The run was stopped; :class:`~evit_deploy.errors.Interrupted` if its state was saved.
    """
    name, state, log = stage.name, stage.state, stage.log
    world, rank = PartialState().num_processes, PartialState().process_index
    per_epoch = data.steps_per_epoch(section.images_per_step(world))
    steps = section.steps or max(1, round((section.epochs or 1) * per_epoch))
    _LOG.info(f"{name}: {steps} steps ({steps / per_epoch:.3g} epochs), {_rate_text(section, world)}")
    if section.processes not in (None, world):
        _LOG.warning(_processes_text(section, world))
    if section.lowest_learning_rate(world) != section.min_learning_rate:
        _LOG.warning(_lowest_text(section, world, name))
    run = TrainingRun(model, section, teacher)
    found = state.read() if state is not None else None
    if found is not None:
        run.load(found)
        if curriculum is not None:
            curriculum.load_state_dict(found["curriculum"])
        complete = run.step >= steps
        _LOG.info(f"{name}: was complete" if complete else f"{name}: goes on at step {run.step + 1} of {steps}")
    if log is not None:
        log.begin(run.step, per_epoch)
    batches = data.training(
        section.batch_size * world, seed, rank=rank, world=world, start_step=run.drawn, curriculum=curriculum,
        device=run.device,
    )  # fmt: skip
    results = _Results(run, name, steps, log, curriculum)
    tokens: _Tokens | None = None
    model.train(section.model_mode == "train")
    try:
        with _threads(section.threads), _programs(section), _convolutions_tried(), interruptible() as stop:
            while run.step < steps:
                step = run.step
                if rank:  # other stochastic depth in every process, also after --resume, which restores rank 0's state
                    torch.manual_seed(seed + 7919 * rank + 104729 * step)
                tokens, plan, moving = _set_tokens_(model, section, step, per_epoch, tokens)
                rate = learning_rate(section, step, steps, world)
                done = run.advance(
                    batches, rate, moving=moving, asked=stop.asked,
                    backbone=backbone_rate_scale(section, step, per_epoch),
                )  # fmt: skip
                results.add(_Sent(done, step, rate, plan))
                stopped = stop.asked and world == 1  # several processes must agree on the step to stop at
                evaluates = _falls_due(section.evaluate_every, run.step, per_epoch) and run.step < steps
                saves = run.step % section.save_every == 0
                # Evaluate and save only weights whose steps are known to be finite.
                if not results.read(0 if stopped or evaluates or saves or run.step == steps else LATE):
                    continue
                if results.asked:
                    stopped = True
                    if not results.read(0):
                        continue
                if evaluates:
                    row = evaluate(model, data, evaluation_batch_size)
                    _LOG.info(
                        f"{name}: after {run.step / per_epoch:.3g} epochs validation top-1 is {row.top1:.2%}, loss "
                        f"{run.losses[-1]:.3g}, {plan.blocks[-1].tokens_out} tokens at the end"
                    )
                    if log is not None:
                        log.evaluated(row.top1)
                if stopped or saves:
                    results.good = run.state()
                    saved = _write(state, log, results.good, curriculum)
                    if stopped:
                        raise _stopped(f"{name} stopped after step {run.step} of {steps}", state, saved)
        if log is not None:
            log.row()
        _write(state, log, run.state(), curriculum)
        run.finish()
        if curriculum is not None and curriculum.level < 1:
            _LOG.warning(curriculum.unfinished(name))
    finally:  # restore the full token reduction even if training failed
        set_keep_rate_(model, 1.0)
        model.eval()
    return run.losses


class _Sent(NamedTuple):
    """A queued step."""

    done: StepResult
    step: int
    rate: float
    plan: TokenPlan


class _Results:
    """Reads the results of queued steps in order, and logs them.

    If a loss or a gradient is not finite, the run returns to the last good state, at most once.

    Args:
        run: The run, in a good state.
        name: Name of the stage in messages.
        steps: Length of the run.
        log: Log of the steps.
        curriculum: Updated with each batch's accuracy. Later images depend on it, so with a curriculum every step is
            read at once.
    """

    def __init__(
        self, run: TrainingRun, name: str, steps: int, log: TrainingLog | None, curriculum: Curriculum | None
    ) -> None:
        self._run, self._name, self._steps, self._log, self._curriculum = run, name, steps, log, curriculum
        self.good, self.asked = run.state(), False
        """The last good state, and whether any process was asked to stop."""
        self._sent: deque[_Sent] = deque()
        self._went_back = False
        self._images, self._seconds = 0, 0.0  # since the last progress message

    def add(self, sent: _Sent) -> None:
        """Adds a step that was just queued."""
        self._sent.append(sent)

    def read(self, late: int) -> bool:
        """Reads all results except those of the latest ``late`` steps.

        Returns:
            Whether they were finite. If not, the run has returned to the last good state and later steps are discarded.

        Raises:
            StageError: A result was not finite for the second time.
        """
        while len(self._sent) > (late if self._curriculum is None else 0):
            sent = self._sent.popleft()
            self.asked |= sent.done.asked
            if self._curriculum is not None:
                for share in sent.done.correct:
                    self._curriculum.update(share)
            if not sent.done.finite:
                self._go_back(sent)
                return False
            self._run.losses.append(sent.done.loss)
            if self._log is not None:
                self._log.add(sent.done, self._run.losses, sent.rate, sent.plan)
            self._tell(sent)
        return True

    def _go_back(self, sent: _Sent) -> None:
        _check_once(sent.done, self._went_back, self._name, sent.step, sent.rate)
        self._went_back, drawn = True, self._run.drawn
        self._sent.clear()
        self._run.load(self.good)
        self._run.drawn = drawn  # continue with new images instead of repeating these
        back = self._run.step + 1
        _LOG.warning(f"{self._name}: step {sent.step + 1} was not finite; went back to step {back}, once")

    def _tell(self, sent: _Sent) -> None:
        self._images, self._seconds = self._images + sent.done.images, self._seconds + sent.done.seconds
        number, tokens = sent.step + 1, sent.plan.blocks[-1].tokens_out
        if sent.step % max(1, self._steps // 100) == 0 or number == self._steps:
            progress.step(
                _LOG, f"{self._name}: step {number} of {self._steps}, {tokens} tokens at the end",
                number, self._steps, images_per_second=self._images / self._seconds, loss=sent.done.loss,
            )  # fmt: skip
            self._images, self._seconds = 0, 0.0


class _Tokens(NamedTuple):
    """Token reduction of a step.

    Args:
        progress: See :func:`keep_rate_progress`.
        layer_wise: See :func:`is_layer_wise`.
    """

    progress: float
    layer_wise: bool


def _set_tokens_(
    model: nn.Module, section: TrainSection, step: int, per_epoch: int, before: _Tokens | None
) -> tuple[_Tokens, TokenPlan, bool]:
    """Sets the token reduction of a step, unless it is already set.

    Args:
        model: The model.
        section: Settings of the training.
        step: 0-based.
        per_epoch: Steps per epoch.
        before: The present token reduction; ``None`` if unknown, as after resuming.

    Returns:
        The token reduction, the token plan, and whether the keep rate is changing.
    """
    now = _Tokens(keep_rate_progress(section, step, per_epoch), is_layer_wise(section, step, per_epoch))
    then = keep_rate_progress(section, step + 1, per_epoch)
    options = {"layer_wise": True} if now.layer_wise else None
    plan = token_plan(model) if now == before else set_keep_rate_(model, now.progress, options)
    if isinstance(model, EvoLeViT):  # the released training learns α only once whole stages sort
        model.learn_alpha_(not now.layer_wise)
    return now, plan, 0 < now.progress < 1 or now.progress != then


def _write(
    state: StateFile | None,
    log: TrainingLog | None,
    content: dict[str, Any],
    curriculum: Curriculum | None,
) -> bool:
    """Saves the state and returns whether that worked. A full disk does not end a run: the previous state remains."""
    if state is None or not PartialState().is_main_process:
        return False
    try:
        if (
            log is not None
        ):  # before the state: extra rows are dropped on resume, but missing ones could not be restored
            log.write()
        state.write(content | {"curriculum": curriculum.state_dict() if curriculum is not None else None})
    except StageError as error:
        _LOG.warning(f"the state could not be saved; training continues without it: {error}")
        return False
    return True


def _stopped(text: str, state: StateFile | None, saved: bool) -> KeyboardInterrupt:
    """Returns the exception that ends a run that was asked to stop."""
    if state is None or not state.path.exists():
        return KeyboardInterrupt()
    return Interrupted(f"{text}, {'saved as' if saved else 'and what was saved last is'} {state.path}")


def _falls_due(every: float | None, step: int, per_epoch: int) -> bool:
    return every is not None and int(step / (every * per_epoch)) > int((step - 1) / (every * per_epoch))


def _check_once(done: StepResult, went_back: bool, stage: str, step: int, rate: float) -> None:
    if went_back:
        raise StageError(
            "the loss is no longer finite" if not math.isfinite(done.loss) else "a gradient is no longer finite",
            where=f"{stage}, step {step + 1}",
            seen=f"loss {done.loss:.3g} at learning rate {rate:.3g}, again after going back to a good state",
            fix=f"Lower {stage}.learning_rate, lengthen {stage}.warmup or set {stage}.clip.",
        )


def _rate_text(section: TrainSection, world: int) -> str:
    images, rate = section.images_per_step(world), section.effective_learning_rate(world)
    parts = [f"{section.batch_size}"]
    parts += [f"{section.accumulate} accumulated"] if section.accumulate > 1 else []
    parts += [f"{world} processes"] if world > 1 else []
    text = f"{images} images a step" + (f" ({' × '.join(parts)})" if len(parts) > 1 else "")
    text += f", learning rate {rate:.4g}"
    if section.learning_rate_batch is None:
        return text
    return f"{text} = {section.learning_rate:g} × {images} / {section.learning_rate_batch}"


def _lowest_text(section: TrainSection, world: int, name: str) -> str:
    highest, lowest = section.effective_learning_rate(world), section.lowest_learning_rate(world)
    return (
        f"{name}: min_learning_rate {section.min_learning_rate:g} is above the highest rate of a step of "
        f"{section.images_per_step(world)} images, {highest:.4g}; it is scaled like that one, to {lowest:.4g}"
    )


def _processes_text(section: TrainSection, world: int) -> str:
    assert section.processes is not None
    meant = section.images_per_step(section.processes)
    accumulate = max(1, round(section.accumulate * section.processes / world))
    return (
        f"the recipe was written for {section.processes} processes, {meant} images a step; with {world} it is "
        f"{section.images_per_step(world)}. For as many set accumulate={accumulate}; otherwise the learning rate is "
        + ("scaled to what there is." if section.learning_rate_batch else "that of the larger step.")
    )


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)  # used by timm's augmentations
    np.random.seed(seed % 2**32)  # likewise


def _programs(section: TrainSection) -> AbstractContextManager[Any]:
    """Raises PyTorch's limit of compiled programs, a setting of the whole process, to :data:`PROGRAMS`."""
    if not section.compile:
        return nullcontext()
    import torch._dynamo.config as config

    return config.patch(recompile_limit=PROGRAMS, accumulated_recompile_limit=PROGRAMS)


@contextmanager
def _convolutions_tried() -> Iterator[None]:
    """Turns cuDNN's autotuning on: batches have one size, and without it cuDNN may not use the tensor cores."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
