"""TensorRT and TensorRT-RTX: runs a plan on an NVIDIA GPU, with PyTorch tensors as buffers.

The two libraries have the same API in two packages. Each batch size has a separate execution context with fixed shapes,
buffers and CUDA graph (:class:`~evit_deploy.runtimes.tensorrt_lane.Lane`).
"""

import importlib.util
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import torch

from evit_deploy.bundle.manifest import TensorSpec, choose_profile
from evit_deploy.engines.layers import Layer, parse_layers
from evit_deploy.engines.plan_file import MODULES, misfit, read_header
from evit_deploy.engines.plugin.library import load_plugin
from evit_deploy.environment.nvidia import compute_capability, missing_gpu
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import EvitDeployError, InputError, MissingRequirement, StageError
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.runtimes.resident import CudaMark
from evit_deploy.runtimes.runner import Mark, Resident, Runner, Timings
from evit_deploy.runtimes.tensorrt_lane import Lane, torch_dtype

LANES = 16
"""Maximum number of prepared batch sizes; the oldest is dropped first."""
WARM_UP = 3


class TensorRTRunner(Runner):
    """Runs a plan.

    Kept candidates (``kept_<block>``) are returned if the plan was built with these outputs; ``with_indices`` cannot
    add them later, and otherwise :attr:`outputs` has only the answer.

    Args:
        artifact: The plan.
        threads: Not used.
        with_indices: See above.
        plugin: Library with the plan's plugins. It is loaded into this process, so use only libraries that you trust.
            ``None`` loads none.
        graphs: Whether to replay the work as a CUDA graph.
    """

    name = "tensorrt"
    files = ("engine.plan",)
    on_gpu = True
    module: ClassVar[str] = "tensorrt"

    def __init__(
        self,
        artifact: Any,
        *,
        threads: int | None = None,
        with_indices: bool = False,
        plugin: Path | None = None,
        graphs: bool = True,
    ) -> None:
        super().__init__(artifact, threads=threads, with_indices=with_indices)
        self.plugin, self.graphs = plugin, graphs
        self.notes: list[str] = []
        self._drawn: tuple[int, dict[str, np.ndarray]] = (0, {})

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """Checks for the package, PyTorch with CUDA, and a GPU with its driver."""
        if importlib.util.find_spec(cls.module) is None:
            return MissingRequirement(
                f"{MODULES[cls.name]} is not installed", wanted=f"{cls.module} in Python", fix=install_line(cls.name)
            )
        return missing_gpu()

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """Accepts plans of this library by path, recognized by their header."""
        if not isinstance(artifact, str | Path):
            return [f"it runs plans, not {type(artifact).__name__}"]
        try:
            header = read_header(Path(artifact))
        except InputError as error:
            return [str(error).rstrip(".")]
        if header.family != cls.name:
            return [f"{artifact} is a plan of {MODULES[header.family]}; give --runtime {header.family}"]
        return []

    def __enter__(self) -> Self:
        path = Path(self.artifact)
        self._header = read_header(path)
        lacking = self.missing()
        if lacking is not None:
            raise lacking
        try:
            self._trt: Any = importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            fix = f"pip install --force-reinstall {self.module.replace('_', '-')}"
            raise MissingRequirement(
                f"{MODULES[self.name]} is installed and broken: {error}", where=self.module, fix=fix
            ) from error
        if self.plugin is not None:  # after TensorRT's library, because it registers itself there
            load_plugin(Path(self.plugin))
        self._device = torch.cuda.current_device()
        self._logger = _logger(self._trt)
        # engine_host_code_allowed stays False: host code in a plan would run with this process's rights.
        self._runtime = self._trt.Runtime(self._logger)
        content = path.read_bytes()
        self._before_loading(content)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise self._refusal()
        self._stream = torch.cuda.Stream(self._device)
        self._lanes: dict[int, Lane] = {}
        self._profiles = batch_profiles(self._engine, self.inputs[0].name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.synchronize()
        self._lanes.clear()  # graphs and contexts before the engine that they refer to
        del self._engine, self._runtime

    def _before_loading(self, content: bytes) -> None:
        """Checks a plan before loading; only TensorRT-RTX has such a check."""

    def _refusal(self) -> EvitDeployError:
        """Returns the error for a plan that the library did not load."""
        path, capability = Path(self.artifact), compute_capability(self._device)
        error = misfit(path, self._header, version=self._trt.__version__, gpu=capability)
        if error is not None:
            return error
        words = " ".join(self._logger.errors[:2])
        if "plugin" in words.lower() and self.plugin is None:
            fix = "Give the library it was built with: --plugin PATH."
            return InputError(f"the plan needs a plugin ({words})", where=path, fix=fix)
        return InputError(
            f"{MODULES[self.name]} refuses the plan ({words or 'it does not say why'})",
            where=path,
            fix="Convert again on this machine.",
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs declared by the plan."""
        return self._specs("INPUT")

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs declared by the plan."""
        return self._specs("OUTPUT")

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """Batch sizes of its optimization profiles."""
        return self._profiles

    def _specs(self, mode: str) -> tuple[TensorSpec, ...]:
        engine, wanted = self._engine, getattr(self._trt.TensorIOMode, mode)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return tuple(
            TensorSpec(
                name,
                str(torch_dtype(engine.get_tensor_dtype(name))).removeprefix("torch."),
                tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name)),
            )
            for name in names
            if engine.get_tensor_mode(name) == wanted
        )

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch; bfloat16 answers are returned as float32."""
        lane = self._lane(_batch_of(feeds))
        lane.fill(feeds)
        with torch.cuda.stream(self._stream):
            lane.copy_in()
            lane.launch()
            lane.copy_out()
        self._stream.synchronize()
        return lane.answers()

    def synchronize(self) -> None:
        """Waits for the stream."""
        self._stream.synchronize()

    def resident(self, feeds: Mapping[str, np.ndarray]) -> Resident:
        """Places the batch in the buffers that :meth:`infer` also uses; runs the engine or its CUDA graph."""
        return _LaneResident(self._lane(_batch_of(feeds)), self._stream, feeds)

    def timings(self, batch: int, *, calls: int = 100, duration: float = 0.0, warm_up: float = 0.2) -> Timings:
        """Times consecutive calls on random images: enqueue time by the host's clock, the rest by CUDA events.

        Args:
            batch: Images per call.
            calls: Minimum number of calls.
            duration: Minimum seconds to measure.
            warm_up: Seconds to run first, so that the GPU's clocks are up.

        Raises:
            InputError: No profile covers the batch.
        """
        lane = self._lane(batch)
        lane.fill(self._random_feeds(batch))
        rows: list[tuple[float, ...]] = []
        begin = time.perf_counter()
        end = begin + warm_up + duration
        while len(rows) < calls or time.perf_counter() < end:
            row = self._timed(lane)
            if time.perf_counter() - begin >= warm_up:
                rows.append(row)
        enqueue, h2d, compute, d2h = np.array(rows).T
        return Timings(enqueue, h2d, compute, d2h)

    def _timed(self, lane: Lane) -> tuple[float, float, float, float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        with torch.cuda.stream(self._stream):
            marks[0].record(self._stream)
            lane.copy_in()
            marks[1].record(self._stream)
            started = time.perf_counter()
            lane.launch()
            enqueue = 1e3 * (time.perf_counter() - started)
            marks[2].record(self._stream)
            lane.copy_out()
            marks[3].record(self._stream)
        marks[3].synchronize()
        h2d, compute, d2h = (first.elapsed_time(second) for first, second in itertools.pairwise(marks))
        return enqueue, h2d, compute, d2h

    def layer_times(self, batch: int, *, calls: int = 20) -> list[tuple[str, float]]:
        """Returns the mean milliseconds of each layer, by the library's profiler, which slows the engine slightly.

        Args:
            batch: Images per call.
            calls: Calls to average over.

        Raises:
            InputError: No profile covers the batch.
        """
        # A separate context, because a context with a profiler cannot be captured into a graph.
        lane = self._new_lane(batch, graph=False)
        lane.fill(self._random_feeds(batch))
        profiler = _profiler(self._trt)
        with torch.cuda.stream(self._stream):
            lane.copy_in()
            for call in range(WARM_UP + calls):
                if call == WARM_UP:
                    lane.context.profiler = profiler
                lane.launch()
                self._stream.synchronize()
        return [(name, total / calls) for name, total in profiler.totals.items()]

    def layers(self) -> tuple[Layer, ...]:
        """Returns the layers that the engine inspector lists; with types if built with detailed verbosity."""
        inspector = self._engine.create_engine_inspector()
        return parse_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _random_feeds(self, batch: int) -> dict[str, np.ndarray]:
        if self._drawn[0] != batch:  # a large batch takes longer to draw than to run
            draw = np.random.default_rng(0)
            feeds = {
                spec.name: draw.standard_normal((batch, *[int(n or 1) for n in spec.shape[1:]]), dtype=np.float32)
                for spec in self.inputs
            }
            self._drawn = batch, feeds
        return self._drawn[1]

    def _lane(self, batch: int) -> Lane:
        if batch not in self._lanes:
            while len(self._lanes) >= LANES:
                del self._lanes[next(iter(self._lanes))]
            self._lanes[batch] = self._new_lane(batch, graph=self.graphs)
        return self._lanes[batch]

    def _new_lane(self, batch: int, *, graph: bool) -> Lane:
        profile = choose_profile(self._profiles, batch)
        context = self._new_context(graph=graph)
        if context is None:
            raise StageError(f"no execution context for batch {batch} (is the GPU's memory full?)", where=self.artifact)
        context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        self._stream.synchronize()
        lane = Lane(self._engine, context, self._stream, self.inputs, self.outputs, batch)
        if graph and self._captures:
            why_not = lane.capture()
            note = f"No CUDA graph: the engine cannot be captured ({why_not})."
            self.notes += [note] if why_not and note not in self.notes else []
        return lane

    def _new_context(self, *, graph: bool) -> Any:
        return self._engine.create_execution_context()

    _captures: ClassVar[bool] = True
    """Whether the runner captures CUDA graphs; TensorRT-RTX captures them itself."""


class _LaneResident(Resident):
    """A batch in the buffers of a lane; the engine itself converts types in its first and last layers."""

    def __init__(self, lane: Lane, stream: torch.cuda.Stream, feeds: Mapping[str, np.ndarray]) -> None:
        self._lane, self._stream = lane, stream
        lane.fill(feeds)
        with torch.cuda.stream(stream):
            lane.copy_in()

    def run(self) -> None:
        with torch.cuda.stream(self._stream):
            self._lane.launch()

    def round_trip(self) -> None:
        with torch.cuda.stream(self._stream):
            self._lane.copy_in()
            self._lane.launch()
            self._lane.copy_out()

    def answers(self) -> dict[str, np.ndarray]:
        return self._lane.answers()

    def mark(self) -> Mark:
        return CudaMark(self._stream)


class TensorRTRTXRunner(TensorRTRunner):
    """Runs a plan of TensorRT-RTX; see :class:`TensorRTRunner`."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"
    _captures = False

    def __enter__(self) -> Self:
        if self.plugin is not None:
            raise InputError("TensorRT-RTX takes no plugins", where="plugin", seen=self.plugin, fix="Leave it out.")
        return super().__enter__()

    def _before_loading(self, content: bytes) -> None:
        error = misfit(
            Path(self.artifact),
            self._header,
            version=self._trt.__version__,
            gpu=compute_capability(self._device),
        )
        validity, words = engine_validity(self._trt, self._runtime, content)
        if validity == "SUBOPTIMAL":
            self.notes.append("TensorRT-RTX calls the plan valid, but not the best for this GPU: convert again here.")
        if validity == "INVALID":
            raise error or InputError(
                f"TensorRT-RTX refuses the plan ({', '.join(words) or 'it does not say why'})",
                where=self.artifact,
                fix="Convert again on this machine.",
            )

    def _new_context(self, *, graph: bool) -> Any:
        config = self._engine.create_runtime_config()
        strategies = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graph else strategies.DISABLED
        return self._engine.create_execution_context(runtime_config=config)


def engine_validity(trt: Any, runtime: Any, content: bytes) -> tuple[str, list[str]]:
    """Checks a plan with TensorRT-RTX before loading it.

    Args:
        trt: The library.
        runtime: Its runtime.
        content: The plan.

    Returns:
        ``VALID``, ``SUBOPTIMAL`` or ``INVALID``, and the reasons; without a GPU no plan is valid.
    """
    validity, bits = runtime.get_engine_validity(content)
    known = trt.EngineInvalidityDiagnostics.__members__
    return validity.name, [name.lower().replace("_", " ") for name, flag in known.items() if int(bits) & int(flag)]


def batch_profiles(engine: Any, name: str) -> tuple[BatchProfile, ...]:
    """Returns the batch sizes of an engine's optimization profiles.

    Args:
        engine: The library's engine.
        name: One of its inputs; all have the same batch size.
    """
    shapes = [engine.get_tensor_profile_shape(name, index) for index in range(engine.num_optimization_profiles)]
    return tuple(BatchProfile(*(int(shape[0]) for shape in row)) for row in shapes)


def _batch_of(feeds: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(feeds.values())))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # defined here because the base class needs the package
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.totals: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.totals[layer_name] = self.totals.get(layer_name, 0.0) + ms

    return Profiler()
