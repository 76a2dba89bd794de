"""The interface of a conversion target: how an exported model is written, audited, run and packaged.

Targets are registered in :data:`evit_deploy.registry.TARGETS`. Other packages add theirs with the entry point
``evit_deploy.targets``; no other module refers to a target by name.
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
"""The target that every bundle has; all others are made from its file."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a target without options."""


class Exported(msgspec.Struct, frozen=True):
    """A reduced model and its dense twin, exported in one precision; the input of :meth:`Target.write`.

    Args:
        model: The reduced PyTorch model, FP32.
        dense: The PyTorch model of the dense twin, FP32.
        plan: Token counts of the reduced model.
        precision: Precision of the ONNX files.
        folder: Folder of the new bundle, with ``model.onnx`` and ``dense/model.onnx``.
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
        dense: Whether it belongs to the dense twin.
        engine: For an engine, the manifest's record of it.
        facts: Information from the builder for :meth:`Target.audit`.
    """

    path: Path
    dense: bool
    engine: Engine | None = None
    facts: Any = None


class Target(ABC):
    """A format that a reduced model can be converted to."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    """Struct of its options; the string below a field is its documentation."""
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    """Supported precisions."""
    engine: ClassVar[bool] = False
    """Whether it writes ``engine.plan``; a bundle can have only one. The default precision is FP16 for engines and FP32
    otherwise, because GPUs do not fuse FP32 attention and CPUs are slow in FP16."""
    linear: ClassVar[Linear] = "gemm"
    """Form of the linear layers in the ONNX file that it is made from. Which form is faster in TensorRT is not settled:
    on one GPU, with TensorRT 10.3, others measured ``matmul`` 7 to 13 % faster. ``recipes/a100.yaml`` can compare
    them."""
    runtimes: ClassVar[tuple[str, ...]] = ()
    """Names in the registry of the runtimes that can run its files."""
    platforms: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {}
    """Support in ``package``: kind of package -> (platform, files of the bundle that it runs)."""

    needs: ClassVar[Needs] = Needs()
    """Requirements beyond PyTorch and ONNX."""

    @classmethod
    def automatic(cls) -> bool:
        """Whether ``convert`` uses this target by default on this machine."""
        return False

    @classmethod
    @abstractmethod
    def refuse(cls, precision: str, options: Any) -> list[EvitDeployError]:
        """Returns why the target cannot be made here; called before any work, and the first error is raised.

        Args:
            precision: One of :attr:`precisions`.
            options: An instance of :attr:`Options`.
        """

    @classmethod
    @abstractmethod
    def write(cls, exported: Exported, options: Any) -> list[Artifact]:
        """Writes the files of the model and of its dense twin into ``exported.folder``.

        Raises:
            StageError: They could not be created.
        """

    @classmethod
    def audit(cls, artifacts: list[Artifact], plan: TokenPlan) -> Report:
        """Checks the written files, apart from their answers, which ``verify`` compares."""
        return Report()

    @classmethod
    def provers(cls, precision: str, options: Any) -> tuple[str, ...]:
        """Returns the runtimes that verify the target here; empty if it was made for another machine."""
        return cls.runtimes


def refusals(*checks: Callable[[], object]) -> list[EvitDeployError]:
    """Calls several checks and returns the errors that they raise."""
    found = []
    for check in checks:
        try:
            check()
        except EvitDeployError as error:
            found.append(error)
    return found


def available(driver: Nvidia | None = None, broken: Mapping[str, str] | None = None) -> tuple[Availability, ...]:
    """Returns for each target whether it can be built and run here.

    Args:
        driver: Result of :func:`~evit_deploy.environment.nvidia.nvidia`, if already known.
        broken: Package -> why it does not load, if that was tested.
    """
    driver = driver or nvidia()
    return tuple(availability(name, target.needs, driver, broken) for name, target in all_targets().items())


def usable_targets() -> tuple[str, ...]:
    """Returns the targets that can be both built and run here."""
    return tuple(found.name for found in available() if found.builds and found.runs)


def all_targets() -> dict[str, type[Target]]:
    """Returns every registered target by name."""
    return {name: TARGETS.get(name) for name in TARGETS.names()}
