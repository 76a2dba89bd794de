"""One training run from step to step: task, optimiser, loss scaler and average, on one process or several."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import msgspec
import torch
from accelerate import PartialState
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from evit_deploy.errors import StageError
from evit_deploy.recipe.sections import TrainSection
from evit_deploy.training.state import random_state, set_random_state
from evit_deploy.training.tasks import Teacher, make_task

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Batches = Iterator[tuple[Tensor, ...]]


class StepResult(msgspec.Struct, frozen=True):
    """What one step did.

    Args:
        loss: Mean over the step's images, over all processes.
        norm: Of the gradient, before it was clipped; infinite or NaN where the loss scaler left the step out.
        images: Images of the step, over all processes.
        seconds: Wall time.
        waited: Of these, for data.
        correct: For each batch of the step, the share of its images that were classified correctly.
    """

    loss: float
    norm: float
    images: int
    seconds: float
    waited: float
    correct: tuple[float, ...] = ()


class TrainingRun:
    """A model in training. It is trained in place.

    Args:
        model: Dense, or reduced by ``reduce_tokens_``, on the device to train on.
        section: How to train.
        teacher: Whom it learns from.
    """

    def __init__(self, model: nn.Module, section: TrainSection, teacher: Teacher | None = None) -> None:
        self.model, self.section, self.processes = model, section, PartialState()
        self.device = next(model.parameters()).device
        self.step, self.drawn = 0, 0
        self.losses: list[float] = []
        if section.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if section.checkpoint_activations:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        self._task = make_task(model, section, teacher)
        never = getattr(model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(model, section.weight_decay, no_weight_decay_list=never)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=section.betas, fused=fused)
        self.average = ModelEmaV3(model, decay=section.ema) if section.ema is not None else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=section.autocast == "fp16")
        if self.processes.num_processes > 1:
            ids = [self.processes.local_process_index] if self.device.type == "cuda" else None
            self._task.prepare_distributed(device_ids=ids)
        self._eager = self._task.trainable_module
        self._compiled = torch.compile(self._eager) if section.compile else self._eager

    def advance(self, batches: Batches, rate: float, *, moving: bool) -> StepResult:
        """Takes one optimiser step.

        Args:
            batches: Where images come from; as many as the step accumulates are drawn.
            rate: The learning rate.
            moving: Whether token counts change from step to step: then the model runs as it is, since compiling it for
                each of them would take longer than training.

        Raises:
            StageError: The batch does not fit into memory; the message says which would.
        """
        section, started, waited, loss = self.section, time.perf_counter(), 0.0, 0.0
        self._correct: list[float] = []
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._task.trainable_module = self._eager if moving else self._compiled
        for part in range(section.accumulate):
            asked = time.perf_counter()
            batch = [tensor.to(self.device, non_blocking=True) for tensor in next(batches)]
            waited += time.perf_counter() - asked
            if section.channels_last:
                batch[0] = batch[0].contiguous(memory_format=torch.channels_last)
            if section.token_labels is None:
                del batch[2:]  # another stage's
            try:
                loss += self._backward(*batch, last=part == section.accumulate - 1)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; CPU allocators have none of their own
                if not _is_memory(error):
                    raise
                raise self._too_large(batch) from None
        self.drawn += section.accumulate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), section.clip or math.inf).item()
        loss = self._mean(loss)
        if math.isfinite(loss) and (self.scaler.is_enabled() or math.isfinite(norm)):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
            self.losses.append(loss)
            if self.average is not None:
                self.average.update(self.model, step=self.step)
        else:
            self.scaler.update()  # it has unscaled, and would refuse to do so again
        images_of_step = section.images_per_step(self.processes.num_processes)
        correct = tuple(map(self._mean, self._correct))
        return StepResult(loss, norm, images_of_step, time.perf_counter() - started, waited, correct)

    def _backward(self, images: Tensor, targets: Tensor, *token_labels: Tensor, last: bool) -> float:
        autocast = torch.autocast(self.device.type, TYPES.get(self.section.autocast), self.section.autocast in TYPES)
        with nullcontext() if last else self._task.no_sync():
            with autocast:
                done = self._task(images, targets, *token_labels)
                loss = done["loss"] / self.section.accumulate
            self.scaler.scale(loss).backward()
        targets = done.get("target", targets)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        self._correct.append((done["output"].detach().argmax(1) == labels).float().mean().item())
        return loss.item()

    def any_process(self, asked: bool) -> bool:
        """Whether one of the processes was asked to stop: they have to do so at the same step."""
        if self.processes.num_processes == 1:
            return asked
        found = torch.tensor(float(asked), device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return bool(found.item())

    def _mean(self, loss: float) -> float:
        if self.processes.num_processes == 1:
            return loss
        total = torch.tensor(loss, dtype=torch.float64, device="cpu" if self.device.type == "cpu" else self.device)
        torch.distributed.all_reduce(total)
        return total.item() / self.processes.num_processes

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
        """Everything that the next step depends on, on the CPU."""
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
        """Goes back, or on, to a state; ``drawn`` is left to the caller's data where it was already drawn from."""
        self.step, self.drawn = int(state["step"]), int(state["drawn"])
        self.losses = state["losses"].tolist()
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])

    def finish(self) -> None:
        """Leaves the weights that are to be kept in the model: the average, where there is one."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        if self.section.checkpoint_activations:
            self.model.set_grad_checkpointing(False)  # type: ignore[operator]


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
