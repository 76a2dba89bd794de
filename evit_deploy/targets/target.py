"""The contract of a target: what ``convert`` makes of an exported model, how it is checked, and what runs it.

A target is a class in :data:`evit_deploy.registry.TARGETS`; another package adds one by the entry point
``evit_deploy.targets``. No other module knows a target by its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from evit_deploy.bundle.manifest import Engine
from evit_deploy.environment.availability import Availability, Needs, availability
from evit_deploy.environment.nvidia import Nvidia, nvidia
from evit_deploy.errors import EvitDeployError
from evit_deploy.recipe.options import Linear
from evit_deploy.registry import TARGETS
from evit_deploy.report.report import Report
from evit_deploy.tokens.plan import TokenPlan

PORTABLE = "onnx"
"""The target that every bundle has: all others are made from its file."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a target that has none."""


class Exported(msgspec.Struct, frozen=True):
    """A reduced model and its dense twin, exported in one precision; what :meth:`Target.write` starts from.

    Args:
        model: The reduced PyTorch model, FP32.
        dense: The same for the dense twin.
        plan: Token counts of the reduced one.
        precision: Precision of the ONNX files.
        folder: The bundle in the making: ``model.onnx``, and ``dense/model.onnx``.
    """

    model: Any
    dense: Any
    plan: TokenPlan
    precision: str
    folder: Path


class Artifact(msgspec.Struct, frozen=True):
    """One file that a target wrote.

    Args:
        path: The file.
        dense: Whether it is the dense twin's.
        engine: What it was built with, for an engine.
        facts: What the builder reported, for :meth:`Target.audit`.
    """

    path: Path
    dense: bool
    engine: Engine | None = None
    facts: Any = None


class Target(ABC):
    """One kind of thing that a reduced model is made into."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    """Its options; the string below a field is its documentation."""
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    """Precisions that it can be made in."""
    engine: ClassVar[bool] = False
    """Whether it writes ``engine.plan``, of which a bundle holds one. An engine is made in FP16 by default, everything
    else in FP32: no GPU fuses FP32 attention, and no CPU is fast in FP16."""
    linear: ClassVar[Linear] = "gemm"
    """Form of the linear layers in the file that it is made from. Which is faster in TensorRT is open: on one GPU, with
    TensorRT 10.3, others measured ``matmul`` 7 to 13 % faster. ``recipes/a100.yaml`` has lines to compare them."""
    runtimes: ClassVar[tuple[str, ...]] = ()
    """Runtimes that run what it writes, in the registry's names."""
    platforms: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {}
    """What ``package`` can do with it: kind of package -> platform there, and the files of a bundle that this runs."""

    needs: ClassVar[Needs] = Needs()
    """What it needs of a machine beyond PyTorch and ONNX."""

    @classmethod
    def automatic(cls) -> bool:
        """Whether ``convert`` makes it here without being asked to."""
        return False

    @classmethod
    @abstractmethod
    def refuse(cls, precision: str, options: Any) -> list[EvitDeployError]:
        """Why it cannot be made here, asked before any work; the first reason is what the user gets.

        Args:
            precision: One of :attr:`precisions`.
            options: An instance of :attr:`Options`.
        """

    @classmethod
    @abstractmethod
    def write(cls, exported: Exported, options: Any) -> list[Artifact]:
        """Writes the files of the model and of its dense twin into ``exported.folder``.

        Raises:
            StageError: They could not be made.
        """

    @classmethod
    def audit(cls, artifacts: list[Artifact], plan: TokenPlan) -> Report:
        """Checks of what was written, beyond its answers, which ``verify`` compares."""
        return Report()

    @classmethod
    def provers(cls, precision: str, options: Any) -> tuple[str, ...]:
        """Runtimes whose answers prove it here; none where it was made for another machine."""
        return cls.runtimes


def refusals(*checks: Callable[[], object]) -> list[EvitDeployError]:
    """Collects what several checks raise."""
    found = []
    for check in checks:
        try:
            check()
        except EvitDeployError as error:
            found.append(error)
    return found


def available(driver: Nvidia | None = None, broken: Mapping[str, str] | None = None) -> tuple[Availability, ...]:
    """What can be made and run here, target by target.

    Args:
        driver: What the NVIDIA driver said, if it was asked already.
        broken: Package -> why it does not load, if that was tried.
    """
    driver = driver or nvidia()
    return tuple(availability(name, target.needs, driver, broken) for name, target in all_targets().items())


def usable_targets() -> tuple[str, ...]:
    """Targets that can be both made and run here, by what is installed."""
    return tuple(found.name for found in available() if found.builds and found.runs)


def all_targets() -> dict[str, type[Target]]:
    """Every registered target, by name."""
    return {name: TARGETS.get(name) for name in TARGETS.names()}
