"""Steps of a training run: task, optimizer, loss scaler and weight average, in one process or several.

A step does not synchronize with the device. Its results are read later from a :class:`StepResult`, preferably when the
next step has been queued.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from evit_deploy.errors import StageError
from evit_deploy.recipe.sections import TrainSection
from evit_deploy.registry import METHODS
from evit_deploy.tokens.reduce import token_spec
from evit_deploy.tokens.state import TokenBlocks
from evit_deploy.training.state import random_state, set_random_state
from evit_deploy.training.tasks import Teacher, make_task

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Batches = Iterator[tuple[Tensor, ...]]


class StepResult:
    """Result of one step, copied from the device asynchronously.

    The first access to ``loss``, ``norm``, ``correct``, ``asked``, ``finite`` or ``seconds`` waits for the device.

    Args:
        values: Tensor on the device: the loss of each batch (already divided by their number), the gradient norm, and
            each batch's share of correctly classified images. With several processes, summed over them, and followed
            by the number of processes that were asked to stop.
        processes: Number of processes.
        scaled: Whether a loss scaler skips steps with overflowing gradients.
        images: Images of the step, over all processes.
        seconds: Wall time until the step was queued.
        waited: The part of ``seconds`` that was spent waiting for data.
    """

    def __init__(
        self, values: Tensor, processes: int, scaled: bool, *, images: int, seconds: float, waited: float
    ) -> None:
        self.images, self.waited = images, waited
        self._processes, self._scaled, self._seconds = processes, scaled, seconds
        self._values = values.to("cpu", non_blocking=values.is_cuda)  # to pinned memory
        self._there = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    @cached_property
    def _read(self) -> list[float]:
        started = time.perf_counter()
        if self._there is not None:
            self._there.synchronize()
        self._seconds += time.perf_counter() - started
        return [value / self._processes for value in self._values.tolist()]

    @property
    def _batches(self) -> int:
        return (len(self._read) - 1) // 2

    @property
    def loss(self) -> float:
        """Mean loss over the step's images in all processes."""
        return sum(self._read[: self._batches])

    @property
    def norm(self) -> float:
        """Gradient norm before clipping; infinite or NaN if the loss scaler skipped the step."""
        return self._read[self._batches]

    @property
    def correct(self) -> tuple[float, ...]:
        """Share of correctly classified images, for each batch of the step."""
        return tuple(self._read[self._batches + 1 : 2 * self._batches + 1])

    @property
    def asked(self) -> bool:
        """Whether any of several processes had been asked to stop when the step began; the same in all of them."""
        return self._processes > 1 and self._read[-1] > 0

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were finite; with a loss scaler the gradient may overflow."""
        return math.isfinite(self.loss) and (self._scaled or math.isfinite(self.norm))

    @property
    def seconds(self) -> float:
        """Wall time that this process spent on queueing the step and waiting for its result."""
        _ = self._read  # adds the waiting time
        return self._seconds


class TrainingRun:
    """Trains a model in place, step by step.

    Args:
        model: Dense, or reduced by ``reduce_tokens_``, on the device to train on.
        section: Settings of the training.
        teacher: The teacher, if any.
    """

    def __init__(self, model: nn.Module, section: TrainSection, teacher: Teacher | None = None) -> None:
        self.model, self.section, self.processes = model, section, PartialState()
        self.device = next(model.parameters()).device
        self.step, self.drawn = 0, 0
        self.losses: list[float] = []
        if section.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if section.checkpoint_activations:
            set_checkpointing_(model, True)
        self._task = make_task(model, section, teacher)
        self._frozen = [value for name, value in model.named_parameters() if section.freezes(name)]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        groups = parameter_groups(model, section)
        self.optimizer: Any = torch.optim.AdamW(groups, lr=0.0, betas=section.betas, fused=True)  # obeys found_inf
        self.average = ModelEmaV3(model, decay=section.ema) if section.ema is not None else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=section.autocast == "fp16")
        if self.processes.num_processes > 1:
            ids = [self.processes.local_process_index] if self.device.type == "cuda" else None
            self._task.prepare_distributed(device_ids=ids)
        self._eager = self._task.trainable_module
        self._compiled = self._compile() if section.compile else self._eager

    def _compile(self) -> Any:
        """Compiles the model, one graph for each token plan.

        A graph break would silently make it slow, so it is an error, except with several processes, where
        ``DistributedDataParallel`` breaks the graph to overlap communication. Shapes are static: with dynamic shapes
        PyTorch would use one slower program for all plans from the second on.
        """
        return torch.compile(self._eager, fullgraph=self.processes.num_processes == 1, dynamic=False)

    def advance(
        self, batches: Batches, rate: float, *, moving: bool, asked: bool = False, backbone: float = 1.0
    ) -> StepResult:
        """Queues one optimizer step; on a GPU this returns before the step is finished.

        If the loss or a gradient is not finite, the weights are left unchanged but ``step`` still advances; the caller
        should check the result and return to a good state.

        Args:
            batches: Iterator over batches, from which ``accumulate`` are drawn.
            rate: Learning rate.
            moving: Whether token counts change from step to step. The model then runs uncompiled, because compiling it
                for every count would take longer than training.
            asked: Whether this process was asked to stop; shared with the other processes.
            backbone: Factor on the learning rate of the backbone (all layers but the reduction method's).

        Raises:
            StageError: The batch does not fit into memory; the message suggests a size that does.
        """
        section, started, waited = self.section, time.perf_counter(), 0.0
        losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if group.get("own") else rate * backbone
        self._task.trainable_module = self._eager if moving else self._compiled
        for part in range(section.accumulate):
            drawing = time.perf_counter()
            batch = [tensor.to(self.device, non_blocking=True) for tensor in next(batches)]
            waited += time.perf_counter() - drawing
            if section.channels_last:
                batch[0] = batch[0].contiguous(memory_format=torch.channels_last)
            if section.token_labels is None:
                del batch[2:]  # token labels, which only the other stage uses
            try:
                losses.append(self._backward(*batch, last=part == section.accumulate - 1))
            except RuntimeError as error:  # also torch.OutOfMemoryError, a subclass that CPU allocators do not raise
                if not _is_memory(error):
                    raise
                raise self._too_large(batch) from None
        self.drawn += section.accumulate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), section.clip or math.inf)
        if not self.scaler.is_enabled():  # an enabled scaler sets found_inf itself
            self.optimizer.found_inf = (~torch.stack([*losses, norm]).isfinite().all()).float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, step=self.step)
        processes = self.processes.num_processes
        values = torch.stack([*losses, norm, *self._correct])
        if processes > 1:
            values = torch.cat([values, values.new_full((1,), float(asked))]).double()
            torch.distributed.all_reduce(values)
        return StepResult(
            values, processes, self.scaler.is_enabled(), images=section.images_per_step(processes),
            seconds=time.perf_counter() - started, waited=waited,
        )  # fmt: skip

    def _backward(self, images: Tensor, targets: Tensor, *token_labels: Tensor, last: bool) -> Tensor:
        autocast = torch.autocast(self.device.type, TYPES.get(self.section.autocast), self.section.autocast in TYPES)
        with nullcontext() if last else self._task.no_sync():
            with autocast:
                done = self._task(images, targets, *token_labels)
                loss = done["loss"] / self.section.accumulate
            self.scaler.scale(loss).backward()
        targets = done.get("target", targets)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        self._correct.append((done["output"].detach().argmax(1) == labels).float().mean())
        return loss.detach().float()

    def _too_large(self, batch: list[Tensor]) -> StageError:
        """Finds the largest half, quarter, ... of the batch that fits."""
        images = size = len(batch[0])
        while size > 2:
            size //= 2
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._backward(*(part[:size] for part in batch), last=True)
            except RuntimeError as error:
                if not _is_memory(error):
                    raise
                continue
            times = -(-images // size) * self.section.accumulate
            fix = f"Set batch_size={size} and accumulate={times}: a step has as many images then."
            return StageError("out of memory", where=f"batch of {images} images", wanted=f"{size} fit", fix=fix)
        fix = "Set checkpoint_activations=true or autocast=bf16, or take a smaller model."
        return StageError("out of memory, even with 2 images", where=f"batch of {images} images", fix=fix)

    def state(self) -> dict[str, Any]:
        """Returns everything that the next step depends on, copied to the CPU."""
        return {
            "step": self.step,
            "drawn": self.drawn,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "model": _on_cpu(self.model.state_dict()),
            "average": _on_cpu(self.average.module.state_dict()) if self.average is not None else None,
            "optimizer": _on_cpu(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores a state. If batches were drawn since then, the caller must set ``drawn`` to their number again."""
        self.step, self.drawn = int(state["step"]), int(state["drawn"])
        self.losses = state["losses"].tolist()
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])

    def finish(self) -> None:
        """Copies the weight average, if any, into the model, and undoes freezing and activation checkpointing."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self.section.checkpoint_activations:
            set_checkpointing_(self.model, False)


def parameter_groups(model: nn.Module, section: TrainSection) -> list[dict[str, Any]]:
    """Returns the optimizer's parameter groups: with and without weight decay, split into backbone and ``own`` layers.

    Args:
        model: The model; parameters that require no gradient are omitted.
        section: Provides the weight decay.
    """
    never = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, section.weight_decay, no_weight_decay_list=never)
    prefixes = METHODS.get(token_spec(model).method).own_parameters
    own = {id(value) for name, value in model.named_parameters() if name.startswith(prefixes)}
    found = []
    for group in groups:
        for mine in (False, True):
            params = [value for value in group["params"] if (id(value) in own) == mine]
            if params or not mine:
                found.append(group | {"params": params, "own": mine})
    return found


def set_checkpointing_(model: Any, on: bool) -> None:
    """Turns activation checkpointing of the blocks on or off, in place."""
    if isinstance(getattr(model, "blocks", None), TokenBlocks):  # timm's version would bypass TokenBlocks.forward
        model.blocks.checkpointing = on
    else:
        model.set_grad_checkpointing(on)


def _is_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_on_cpu(value) for value in state]
    return state
