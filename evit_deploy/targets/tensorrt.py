"""``tensorrt``: an engine for this machine's GPU, optionally with the plugin."""

from collections.abc import Callable, Sequence
from pathlib import Path

from evit_deploy.bundle.manifest import ENGINE, MODEL, TWIN
from evit_deploy.engines.audit import engine_checks
from evit_deploy.engines.build import build_engine
from evit_deploy.engines.layers import Layer
from evit_deploy.engines.options import BUILDERS, check_options, usable
from evit_deploy.environment.nvidia import compute_capability
from evit_deploy.errors import EvitDeployError
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.report.report import Report
from evit_deploy.targets.target import Artifact, Exported, Target, refusals
from evit_deploy.tokens.plan import TokenPlan


class TensorRT(Target):
    """``engine.plan`` and ``dense/engine.plan``, built by TensorRT from the ONNX files."""

    name = "tensorrt"
    needs = BUILDERS[name].needs
    Options = BuildOptions
    engine = True
    runtimes = ("tensorrt",)
    platforms = {"triton": ("tensorrt", (ENGINE,)), "cpp": ("tensorrt", (ENGINE,))}  # noqa: RUF012

    @classmethod
    def automatic(cls) -> bool:
        """Whether TensorRT and a GPU for it are available."""
        return usable(cls.name)

    @classmethod
    def refuse(cls, precision: str, options: BuildOptions) -> list[EvitDeployError]:
        """Returns errors for values out of range, precisions that a GPU lacks, and a missing builder or GPU."""
        return refusals(lambda: check_options(cls.name, precision, options))

    @classmethod
    def write(cls, exported: Exported, options: BuildOptions) -> list[Artifact]:
        """Builds the engines one after the other, since the builder times kernels and must have the GPU to itself."""
        made = []
        for twin in (TWIN, ""):
            path = exported.folder / twin / ENGINE
            built = build_engine(exported.folder / twin / MODEL, path, cls.name, exported.precision, options)
            made.append(Artifact(path, bool(twin), built.engine, built))
        return made

    @classmethod
    def audit(cls, artifacts: list[Artifact], plan: TokenPlan) -> Report:
        """Checks fused attention and matrix product types of both engines: a slow dense twin would overstate the
        speed-up."""
        from evit_deploy.export.card import read_card
        from evit_deploy.export.outline import read_outline

        report = Report()
        for made in artifacts:
            card = read_card(read_outline(made.path.with_name(MODEL)).proto)
            unquantized = card.unquantized if card is not None else ()
            name = "dense engine" if made.dense else "engine"
            report += engine_checks(made.facts, made.path, plan, name, cls.listing, unquantized)
        return report

    @classmethod
    def provers(cls, precision: str, options: BuildOptions) -> tuple[str, ...]:
        """Returns its runtime if the engine is for this machine's GPU."""
        here = compute_capability()
        return cls.runtimes if here is not None and here in (options.gpus or (here,)) else ()

    listing: Callable[[Path], Sequence[Layer]] | None = None
    """Function that reads the layers from the plan file, for libraries whose inspector needs a GPU."""
