"""The report of checks and measurements, for JSON and for the terminal."""

import importlib
from typing import Any, Literal

import msgspec

from evit_deploy.errors import GateFailed, InputError

FORMAT = 1
"""Version of ``report.json``; its JSON Schema is ``docs/report.schema.json``."""

Clock = Literal["compute", "cpu", "wall"]
"""``compute``: GPU time of the computation alone, by CUDA events; ``cpu``: CPU time of one thread; ``wall``: wall time
of whole calls."""


class Check(msgspec.Struct, frozen=True):
    """A check that passed or failed.

    Args:
        name: What was checked.
        value: Measured value.
        limit: Largest (or smallest) value that passes.
        passed: Whether it passed.
        reason: Explanation of the value, or why the check failed.
    """

    name: str
    value: float | int | str | None
    limit: float | int | str | None
    passed: bool
    reason: str = ""


class ProfileRow(msgspec.Struct, frozen=True):
    """Speed of one candidate at one batch size. Times are by :attr:`clock`, except in the ``end_to_end`` fields.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model``, ``dense``, ``slice``, ``body`` or ``plugin``: see
            :class:`evit_deploy.profiling.candidates.Candidate`. In a sweep or a comparison, the name of the timed
            model.
        batch: Images per call.
        rounds: Number of measured rounds: one call each on a CPU, several on a GPU.
        images_per_second: Batch divided by the median latency.
        p50: Median latency of a call in milliseconds; p95 and p99 likewise.
        p95: See p50.
        p99: See p50.
        variation: Standard deviation divided by mean of the latencies.
        speedup: Time of the dense twin divided by this one's, median over paired rounds.
        speedup_low: Lower end of the 95 % interval of the median.
        speedup_high: Upper end.
        mac_ratio: Dense multiply-adds divided by this one's, counting the whole last block, as papers do.
        computed_mac_ratio: The same for the multiply-adds that are actually computed: in the last block only for the
            tokens that the head uses.
        mac_efficiency: Speed-up divided by the computed MAC ratio: 1 if time is proportional to arithmetic.
        overhead: This one's time divided by the slice twin's, minus 1: the cost of the reorganization itself.
        device: ``cpu`` or ``gpu``; runs on different devices did not take turns.
        clock: ``compute``, GPU time by CUDA events, with inputs already on the GPU; ``cpu``, CPU time of one thread;
            ``wall``, wall time of whole calls. Rows with different clocks cannot be compared.
        end_to_end_images_per_second: Batch divided by the median wall time of a whole call, from images in host memory
            to logits in host memory; ``None`` if :attr:`clock` measures such calls already.
        end_to_end_p50: That time in milliseconds.
        end_to_end_speedup: Time of the dense twin divided by this one's, median over paired rounds.
    """

    runtime: str
    variant: str
    batch: int
    rounds: int
    images_per_second: float
    p50: float
    p95: float
    p99: float
    variation: float
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    mac_ratio: float | None = None
    computed_mac_ratio: float | None = None
    mac_efficiency: float | None = None
    overhead: float | None = None
    device: str = "cpu"
    clock: Clock = "wall"
    end_to_end_images_per_second: float | None = None
    end_to_end_p50: float | None = None
    end_to_end_speedup: float | None = None


class Summary(msgspec.Struct, frozen=True):
    """Summary of a series of latencies in milliseconds.

    Args:
        count: Number of calls.
        minimum: Fastest call.
        maximum: Slowest call.
        mean: Average.
        median: Median; p90, p95 and p99 likewise, with linear interpolation.
        p90: See median.
        p95: See median.
        p99: See median.
        variation: Standard deviation over mean.
    """

    count: int
    minimum: float
    maximum: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    variation: float


class LatencyRow(msgspec.Struct, frozen=True):
    """Breakdown of an engine's time per call, as in trtexec: by CUDA events, in milliseconds.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model``, ``dense``, ``slice``, ``body`` or ``plugin``: see
            :class:`evit_deploy.profiling.candidates.Candidate`.
        batch: Images per call.
        images_per_second: Batch divided by the median compute time: the throughput with data already on the GPU.
        latency: Copies and computation.
        enqueue: Host time to enqueue the work on the stream.
        h2d: Copies to the device.
        compute: Computation of the engine.
        d2h: Copies back.
        speedup: Compute time of the dense twin divided by this one's, median over rounds in which all engines took
            turns.
        overhead: This one's compute time divided by the slice twin's, minus 1.
    """

    runtime: str
    variant: str
    batch: int
    images_per_second: float
    latency: Summary
    enqueue: Summary
    h2d: Summary
    compute: Summary
    d2h: Summary
    speedup: float | None = None
    overhead: float | None = None


class BlockRow(msgspec.Struct, frozen=True):
    """Time and token counts of one transformer block of an engine.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model`` or ``dense``.
        batch: Images per call.
        blocks: ``3``; ``3-4`` for layers with parts of both; ``rest`` for the stem, the head and layers without a
            block.
        tokens_in: Tokens at its attention; in a span, at the first block.
        tokens_out: Tokens at its output; in a span, of the last block.
        layers: Number of engine layers in it.
        milliseconds: Their total time, measured by the library's profiler, which slows execution slightly.
        share: Fraction of the engine's total time, 0 to 1.
    """

    runtime: str
    variant: str
    batch: int
    blocks: str
    tokens_in: int | None
    tokens_out: int | None
    layers: int
    milliseconds: float
    share: float


class BlockErrorRow(msgspec.Struct, frozen=True):
    """Error of one transformer block in a bundle's ONNX file, compared with the PyTorch model in FP32.

    The comparison uses the prefix tokens, which no method removes; for models without prefix tokens, the mean of all
    tokens.

    Args:
        runtime: Runtime that ran the file.
        block: 0-based index.
        images: Number of images.
        error: Root mean square of the difference, divided by that of the variation of the PyTorch model's tokens
            between images; ``None`` if the file's output is not finite.
    """

    runtime: str
    block: int
    images: int
    error: float | None


class LoadRow(msgspec.Struct, frozen=True):
    """Throughput and latency of a served model with concurrent clients, by the clients' wall clock.

    Args:
        model: Its name on the server.
        batch: Images per request.
        clients: Number of concurrent requests.
        requests: Number of measured requests.
        images_per_second: Number of images divided by total time.
        p50: Median time from request to response in milliseconds; p99 likewise.
        p99: See p50.
        images_a_run: Average number of images that the server computed together; above ``batch`` if it combined
            requests.
    """

    model: str
    batch: int
    clients: int
    requests: int
    images_per_second: float
    p50: float
    p99: float
    images_a_run: float


class Difference(msgspec.Struct, frozen=True):
    """Difference in accuracy between two models on the same images.

    Args:
        other: Name of the other model's row.
        value: This model's top-1 minus the other's, as a fraction.
        error: Standard error of the value, from the images on which only one of the two was right. It covers the choice
            of images, not the variation between training runs.
        low: Lower end of the 95 % interval of the value (Bonett and Price); ``None`` if not computed.
        high: Upper end.
    """

    other: str
    value: float
    error: float
    low: float | None = None
    high: float | None = None


class AccuracyRow(msgspec.Struct, frozen=True):
    """Accuracy of one model.

    Args:
        name: Name of the model.
        top1: Fraction of images whose label ranked first.
        top5: Fraction of images whose label ranked among the first five; ``None`` with fewer than six classes.
        count: Number of images.
        low: Lower end of top-1's 95 % interval (Wilson).
        high: Upper end.
        gmacs: Multiply-adds per image, in 10⁹.
        against: Difference to the row that this one is compared with.
        gained: For a fine-tuned model: difference to the initial weights with the same token reduction.
    """

    name: str
    top1: float
    top5: float | None
    count: int
    low: float
    high: float
    gmacs: float | None = None
    against: Difference | None = None
    gained: Difference | None = None


class ComparedRow(msgspec.Struct, frozen=True):
    """A model's answers compared with its dense twin's on the same images.

    Its speed on :attr:`runtime` is in the profile rows with the same name. For models that return an embedding, the
    fields from :attr:`cosine` to :attr:`recall_high` replace agreement and top-1.

    Args:
        name: Name of the bundle or dense twin; ``model`` or ``dense`` if one bundle is compared with its twin.
            Equals ``variant`` of its :class:`ProfileRow`.
        method: Reduction method; ``dense`` for a dense twin.
        settings: Settings of the method, such as ``keep_rate=0.7, locations=2/5/8``.
        precision: Precision of its files.
        gmacs: Multiply-adds per image, in 10⁹.
        mac_ratio: Multiply-adds of the dense twin divided by its own.
        tokens: Tokens after the last block, including the class token.
        dense: Name of its dense twin's row; ``None`` for a dense twin.
        images: Number of images; without any, the fields below are ``None``.
        runtime: Runtime that was used.
        agreement: Fraction of the images for which the dense twin predicts the same class.
        top1: Fraction of images whose label ranked first.
        top1_low: Lower end of the 95 % interval of top-1 (Wilson).
        top1_high: Upper end.
        top5: Fraction of images whose label ranked among the first five; ``None`` with fewer than six classes.
        to_dense: Difference in top-1 or recall@1 to the dense twin, on the same images.
        to_reference: The same difference to the reference bundle.
        cosine: Cosine between an image's embedding and the dense twin's, mean over the images.
        cosine_low: 5th percentile of that cosine.
        cosine_centered: Mean cosine after subtracting the mean of the dense twin's embeddings from both; what
            images have in common makes plain cosines large.
        neighbors: Fraction of the images whose nearest other image is the same as with the dense twin.
        recall: Recall@1: fraction of the images whose nearest other image has the same class.
        recall_low: Lower end of the 95 % interval of recall (Wilson).
        recall_high: Upper end.
    """

    name: str
    method: str
    settings: str
    precision: str
    gmacs: float
    mac_ratio: float
    tokens: int
    dense: str | None = None
    images: int | None = None
    runtime: str | None = None
    agreement: float | None = None
    top1: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    top5: float | None = None
    to_dense: Difference | None = None
    to_reference: Difference | None = None
    cosine: float | None = None
    cosine_low: float | None = None
    cosine_centered: float | None = None
    neighbors: float | None = None
    recall: float | None = None
    recall_low: float | None = None
    recall_high: float | None = None

    @property
    def share(self) -> tuple[float | None, float | None, float | None] | None:
        """Top-1, or recall@1 for embeddings, with the ends of its interval; ``None`` without labels."""
        if self.top1 is not None:
            return self.top1, self.top1_low, self.top1_high
        return None if self.recall is None else (self.recall, self.recall_low, self.recall_high)

    @property
    def share_name(self) -> str:
        """Name of :attr:`share`: ``top-1``, or ``recall@1`` for embeddings."""
        return "recall@1" if self.top1 is None and self.recall is not None else "top-1"


class SensitivityRow(msgspec.Struct, frozen=True):
    """Effect of quantizing only one linear layer.

    Args:
        layer: Name of the layer.
        noise: Error of the outputs divided by their spread, both as root mean squares.
        share: Its share of the noise of all layers (of the sum of squares), 0 to 1.
        weights: Its fraction of the quantized weights, 0 to 1.
        kept: Whether it stayed in the base precision.
    """

    layer: str
    noise: float
    share: float
    weights: float
    kept: bool = False


class AgreementRow(msgspec.Struct, frozen=True):
    """Agreement of two runtimes on the same images.

    Args:
        first: First runtime.
        second: Second runtime.
        images: Number of images.
        top1: Fraction of the images with the same top-1; ``None`` for embeddings.
        kept: By block, Jaccard index of the kept patches (original patch indices), mean over the images; empty if a
            runtime does not return them.
        logits: Largest absolute difference between outputs (logits or embedding).
        cosine: Lowest cosine between the two embeddings of an image; ``None`` for logits.
    """

    first: str
    second: str
    images: int
    top1: float | None
    kept: dict[str, float]
    logits: float
    cosine: float | None = None


class GpuSummary(msgspec.Struct, frozen=True):
    """State of a GPU while one batch size was measured; ``None`` for values that the driver does not report.

    Args:
        name: Name reported by the driver.
        driver: Driver version.
        compute_capability: ``sm80``.
        batch: Images per call.
        samples: Number of samples in which it was busy.
        sm_clock: Lowest and highest, MHz.
        sm_clock_max: Maximum MHz.
        memory_clock: Lowest and highest, MHz.
        memory_clock_max: Maximum MHz.
        slowed_down: Fraction of the samples in which it was throttled, 0 to 1.
        reasons: Reasons for the throttling, as text.
        temperature: Highest, °C.
        power: Highest, watts.
        power_limit: Watts.
    """

    name: str
    driver: str
    compute_capability: str
    batch: int
    samples: int
    sm_clock: tuple[int, int] | None = None
    sm_clock_max: int | None = None
    memory_clock: tuple[int, int] | None = None
    memory_clock_max: int | None = None
    slowed_down: float = 0.0
    reasons: tuple[str, ...] = ()
    temperature: int | None = None
    power: float | None = None
    power_limit: float | None = None


class Report(msgspec.Struct, frozen=True):
    """Result of verify, profile, compare, convert or run.

    Args:
        checks: The checks.
        compared: Models compared with their dense twins.
        rows: Speed measurements, each with its clock.
        latencies: Breakdown of the time per call, for engines.
        blocks: Time by transformer block, for engines.
        block_errors: Error of each transformer block of the ONNX file.
        load: Measurements of servers with concurrent clients.
        gpu: GPU clocks during the measurement, by batch size.
        accuracy: Accuracy during training.
        agreement: Agreement between runtimes.
        sensitivity: Effect of quantizing each linear layer, largest first.
        notes: Sentences for the reader.
        versions: Package versions.
        device: The machine.
        commands: The command lines that produced it; empty if the library was called from Python.
        format: Version of this structure, :data:`FORMAT`.

    Raises:
        InputError: It was written by a later version.
    """

    checks: tuple[Check, ...] = ()
    compared: tuple[ComparedRow, ...] = ()
    rows: tuple[ProfileRow, ...] = ()
    latencies: tuple[LatencyRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    block_errors: tuple[BlockErrorRow, ...] = ()
    load: tuple[LoadRow, ...] = ()
    gpu: tuple[GpuSummary, ...] = ()
    accuracy: tuple[AccuracyRow, ...] = ()
    agreement: tuple[AgreementRow, ...] = ()
    sensitivity: tuple[SensitivityRow, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    device: dict[str, Any] = {}
    commands: tuple[str, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format > FORMAT:
            raise InputError(
                "this report was written by a later version of evit-deploy", seen=f"format {self.format}",
                wanted=f"format {FORMAT} or earlier", fix="Update evit-deploy.",
            )  # fmt: skip

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """Whether every check passed, as a short text."""
        if not self.checks:
            return "no checks"
        if self.failed:
            return f"FAILED: {len(self.failed)} of {len(self.checks)} checks"
        return f"passed: {len(self.checks)} check{'s' * (len(self.checks) > 1)}"

    def __repr__(self) -> str:
        parts = {name: len(value) for name in self.__struct_fields__ if isinstance(value := getattr(self, name), tuple)}
        said = [self.verdict, *(f"{count} {name}" for name, count in parts.items() if count and name != "checks")]
        return f"Report({', '.join(said)})"

    def _repr_html_(self) -> str:
        from evit_deploy.report.html import Page

        page = Page()
        if self.checks:
            page.line(self.verdict, strong=True)
        # Imported here to avoid a cycle: tables import reports.
        importlib.import_module("evit_deploy.report.tables").render(self, page)
        return str(page)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The failed checks."""
        return tuple(check for check in self.checks if not check.passed)

    def raise_if_failed(
        self,
        what: str = "{failed} of {checks} checks failed, first: {name}",
        *,
        where: object = None,
        seen: str = "{value}",
        wanted: str = "{limit}",
        fix: str | None = None,
    ) -> None:
        """Raises at the first failed check; returns if all passed.

        ``what``, ``seen`` and ``wanted`` are format strings with the fields ``failed`` and ``checks`` (counts), and
        ``name``, ``value`` and ``limit`` of the check.

        Args:
            what: What happened.
            where: What was checked.
            seen: The value; left out if the check has none.
            wanted: The limit; left out if the check has none.
            fix: What to do about it, or where the result is; by default the check's reason.

        Raises:
            GateFailed: A check failed.
        """
        if self.passed:
            return
        first, counts = self.failed[0], {"failed": len(self.failed), "checks": len(self.checks)}
        raise GateFailed(
            what.format(name=first.name, value=first.value, limit=first.limit, **counts),
            where=where,
            seen=None if first.value is None else seen.format(value=first.value),
            wanted=None if first.limit is None else wanted.format(limit=first.limit),
            fix=first.reason if fix is None else fix,
        )

    def __add__(self, other: "Report") -> "Report":
        return Report(
            checks=self.checks + other.checks,
            compared=self.compared + other.compared,
            rows=self.rows + other.rows,
            latencies=self.latencies + other.latencies,
            blocks=self.blocks + other.blocks,
            block_errors=self.block_errors + other.block_errors,
            load=self.load + other.load,
            gpu=self.gpu + other.gpu,
            accuracy=self.accuracy + other.accuracy,
            agreement=self.agreement + other.agreement,
            sensitivity=self.sensitivity + other.sensitivity,
            notes=self.notes + tuple(note for note in other.notes if note not in self.notes),
            versions=self.versions | other.versions,
            device=self.device | other.device,
            commands=tuple(dict.fromkeys((*self.commands, *other.commands))),
        )
