"""A runner that computes nothing, for tests of the order of calls and the handling of results."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.export.card import INPUT
from evit_deploy.runtimes.runner import Runner


class IdleRunner(Runner):
    """Accepts anything, and returns nothing."""

    name = "idle"

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(INPUT, "float32", (None, 3, 4, 5)),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return ()

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {}
