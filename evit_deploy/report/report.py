"""What was checked and what was measured: one structure for JSON and for the terminal."""

import importlib
from typing import Any, Literal

import msgspec

from evit_deploy.errors import GateFailed, InputError

FORMAT = 1
"""Of ``report.json``; ``docs/report.schema.json`` is its JSON Schema."""

Clock = Literal["compute", "cpu", "wall"]
"""``compute``: the device's own time of the work alone, by CUDA events; ``cpu``: one thread's CPU time; ``wall``: whole
calls by the wall clock."""


class Check(msgspec.Struct, frozen=True):
    """One yes-or-no question and its answer.

    Args:
        name: What was checked.
        value: What was found.
        limit: What would still have passed.
        passed: Whether it held.
        reason: How the value came about, or why the check failed.
    """

    name: str
    value: float | int | str | None
    limit: float | int | str | None
    passed: bool
    reason: str = ""


class ProfileRow(msgspec.Struct, frozen=True):
    """How fast one candidate ran at one batch size; all of it by :attr:`clock`, but for the fields named end to end.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model``, ``dense``, ``slice``, ``body`` or ``plugin``: see
            :class:`evit_deploy.profiling.candidates.Candidate`. In a sweep or a comparison, the name of what was timed.
        batch: Images per call.
        rounds: Turns measured: of one call on a CPU, of several on a GPU.
        images_per_second: Batch over the median latency.
        p50: Median latency of a call, milliseconds; the same for p95 and p99.
        p95: See p50.
        p99: See p50.
        variation: Standard deviation over mean of the latencies.
        speedup: Dense twin's time over this one's, median of the paired rounds.
        speedup_low: Lower end of the median's 95 % interval.
        speedup_high: Upper end.
        mac_ratio: Dense multiply-adds over this one's, with the last block counted whole, as papers do.
        computed_mac_ratio: The same of the multiply-adds that files and runtimes compute: of the last block only what
            the head sees.
        mac_efficiency: Speed-up over the computed MAC ratio: 1 when time follows arithmetic.
        overhead: This one's time over the slice twin's, less 1: what the reorganization itself costs.
        device: Where it ran, ``cpu`` or ``gpu``; what ran on different ones did not take turns.
        clock: ``compute``, the work alone on a GPU by CUDA events, inputs lying there; ``cpu``, one thread's CPU time;
            ``wall``, whole calls by the wall clock. Rows of different clocks cannot be compared.
        end_to_end_images_per_second: Batch over the median wall time of a whole call, from images in host memory to
            logits in host memory; ``None`` where the row is of such calls itself.
        end_to_end_p50: That time, milliseconds.
        end_to_end_speedup: Dense twin's over this one's, median of the paired rounds.
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
    """One row of latencies in few numbers, milliseconds.

    Args:
        count: Calls.
        minimum: The fastest.
        maximum: The slowest.
        mean: Average.
        median: The middle one; the same for p90, p95 and p99 (linear interpolation).
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
    """Where the time of one engine's calls went, as trtexec reports it: CUDA events, milliseconds.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model``, ``dense``, ``slice``, ``body`` or ``plugin``: see
            :class:`evit_deploy.profiling.candidates.Candidate`.
        batch: Images per call.
        images_per_second: Batch over the median compute time: what the engine could do if data lay on the GPU.
        latency: Copies and compute.
        enqueue: Host time that putting the work on the stream took.
        h2d: Copies to the device.
        compute: The engine itself.
        d2h: Copies back.
        speedup: Dense twin's compute time over this one's, median of the rounds, in which all engines took turns.
        overhead: This one's compute time over the slice twin's, less 1.
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
    """Time of one transformer block of an engine, beside its token counts.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model`` or ``dense``.
        batch: Images per call.
        blocks: ``3``; ``3-4`` for layers that hold parts of both; ``rest`` for the stem, the head and what names none.
        tokens_in: Tokens its attention sees; of a span's first block.
        tokens_out: Tokens it hands on; of a span's last block.
        layers: Layers of the engine in it.
        milliseconds: Their time together, under the library's own profiler, which slows the whole down a little.
        share: Of the whole engine's time, 0 to 1.
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
    """How far the output of one transformer block of a bundle's ONNX file is from the PyTorch model's in FP32.

    Compared are the tokens in front of the patches, which no method removes; of a model without such tokens, the mean
    of its tokens.

    Args:
        runtime: Who ran the file.
        block: 0-based index.
        images: Pictures that both were shown.
        error: Root mean square of the difference, over that of how the PyTorch model's tokens differ from picture to
            picture; ``None`` where the file gives no finite number.
    """

    runtime: str
    block: int
    images: int
    error: float | None


class LoadRow(msgspec.Struct, frozen=True):
    """A served model with several clients at a time, by the clients' wall clock.

    Args:
        model: Its name on the server.
        batch: Images a request.
        clients: Requests under way at a time.
        requests: Requests measured.
        images_per_second: All images over the time that all took.
        p50: Median time from sending a request to its answer, milliseconds; the same for p99.
        p99: See p50.
        images_a_run: Images that the server computed together, on average: above ``batch`` it put requests together.
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
    """How much more often one model was right than another, on the same images.

    Args:
        other: Name of the other's row.
        value: This one's top-1 less the other's, as a share.
        error: Standard error of the value, from the images on which only one of the two was right. It says what other
            images would change, not what another training run would.
        low: Lower end of the value's 95 % interval (Bonett and Price), ``None`` where it was not computed.
        high: Upper end.
    """

    other: str
    value: float
    error: float
    low: float | None = None
    high: float | None = None


class AccuracyRow(msgspec.Struct, frozen=True):
    """How often one model was right.

    Args:
        name: Which model.
        top1: Share of images whose label came first.
        top5: Share of images whose label was among the first five; ``None`` where there are fewer than six classes.
        count: Images.
        low: Lower end of top-1's 95 % interval (Wilson).
        high: Upper end.
        gmacs: Multiply-adds for one image, in 10⁹.
        against: The difference to the row that this one is compared with.
        gained: Of a fine-tuned model: the difference to the weights it started from, their tokens reduced alike.
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
    """What a model is and answers, and what that costs beside its dense baseline on the same images.

    How fast it is stands in the profile rows of the same name, on :attr:`runtime`. The fields from :attr:`cosine` to
    :attr:`recall_high` are of models that answer with an embedding, in place of agreement and top-1.

    Args:
        name: The bundle's, or the dense baseline's; ``model`` or ``dense`` where one bundle is compared with its
            twin. ``variant`` of its :class:`ProfileRow`.
        method: How its tokens are reduced; ``dense`` of a baseline.
        settings: The settings of the method, ``keep_rate=0.7, locations=2/5/8``.
        precision: Of its files.
        gmacs: Multiply-adds for one image, in 10⁹.
        mac_ratio: The dense baseline's multiply-adds over its own.
        tokens: Tokens at the end of the last block, the class token among them.
        dense: Name of the row of its dense baseline; ``None`` of a baseline.
        images: Images that were answered; the fields below are ``None`` without any.
        runtime: What answered them.
        agreement: Share of the images to which the dense baseline gives the same class.
        top1: Share of images whose label came first.
        top1_low: Lower end of top-1's 95 % interval (Wilson).
        top1_high: Upper end.
        top5: Share of images whose label was among the first five; ``None`` where there are fewer than six classes.
        to_dense: Difference of top-1, or of recall@1, to the dense baseline, on the same images.
        to_reference: The same difference to the reference bundle.
        cosine: Cosine of an image's embedding and the dense baseline's, mean over the images.
        cosine_low: The cosine that one image in twenty stays below.
        cosine_centered: Mean cosine after the mean of the dense baseline's embeddings is taken from both: what images
            have in common makes plain cosines large.
        neighbors: Share of the images to which the nearest other image is the same as for the dense baseline.
        recall: Recall@1: share of the images whose nearest other image is of their class.
        recall_low: Lower end of recall's 95 % interval (Wilson).
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
        """Top-1, or recall@1 of embeddings, and the ends of its interval; ``None`` without labels."""
        if self.top1 is not None:
            return self.top1, self.top1_low, self.top1_high
        return None if self.recall is None else (self.recall, self.recall_low, self.recall_high)

    @property
    def share_name(self) -> str:
        """What :attr:`share` is of: ``top-1``, or ``recall@1`` of embeddings."""
        return "recall@1" if self.top1 is None and self.recall is not None else "top-1"


class SensitivityRow(msgspec.Struct, frozen=True):
    """What it costs to quantize one linear layer and no other.

    Args:
        layer: Its name.
        noise: Error of the answers over their spread, both as root mean squares.
        share: Its share of the noise of all layers, 0 to 1: of the sum of their squares.
        weights: Share of the quantized layers' weights that is in it, 0 to 1.
        kept: Whether it stayed in the base precision.
    """

    layer: str
    noise: float
    share: float
    weights: float
    kept: bool = False


class AgreementRow(msgspec.Struct, frozen=True):
    """How much two runtimes agree on the same images.

    Args:
        first: One of them.
        second: The other.
        images: How many.
        top1: Share of the images with the same top-1; ``None`` where the answer is an embedding.
        kept: By block, kept patches in common over kept patches of either (Jaccard, original patch numbers), mean over
            the images; empty where one of them does not tell.
        logits: Largest difference of a number of the answer, a logit or one of an embedding.
        cosine: Lowest cosine of the two embeddings of an image; ``None`` where the answer is logits.
    """

    first: str
    second: str
    images: int
    top1: float | None
    kept: dict[str, float]
    logits: float
    cosine: float | None = None


class GpuSummary(msgspec.Struct, frozen=True):
    """What a GPU did while one batch size was measured; ``None`` where the driver does not say.

    Args:
        name: As the driver calls it.
        driver: Version.
        compute_capability: ``sm80``.
        batch: Images per call.
        samples: How often it was looked at and found busy.
        sm_clock: Slowest and fastest, MHz.
        sm_clock_max: MHz at most.
        memory_clock: Slowest and fastest, MHz.
        memory_clock_max: MHz at most.
        slowed_down: Share of the samples in which something slowed it down, 0 to 1.
        reasons: What did, in words.
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
    """The outcome of verify, profile, compare, convert or run.

    Args:
        checks: What had to hold.
        compared: Models beside their dense baselines: what they are, and how right their answers are.
        rows: What was measured; each row says by which clock.
        latencies: Engines: where the time of a call goes.
        blocks: Engines: time by transformer block.
        block_errors: Error of each transformer block of the ONNX file.
        load: Servers: many clients at a time.
        gpu: What the GPU's clocks did meanwhile, by batch size.
        accuracy: What was right while training.
        agreement: Which runtimes agree.
        sensitivity: What quantizing each linear layer costs, the most expensive first.
        notes: Sentences for the reader.
        versions: Packages.
        device: Where it ran.
        commands: Command lines that it comes from, as they were typed; empty where Python called the library.
        format: Version of this structure, :data:`FORMAT`.

    Raises:
        InputError: It is of a later version.
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
        """Whether every check held."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """Whether every check held, in a few words."""
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
        # By its name: tables are made of reports, and modules form no cycle.
        importlib.import_module("evit_deploy.report.tables").render(self, page)
        return str(page)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not hold."""
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
        """Stops at the first check that did not hold; returns where all held.

        ``what``, ``seen`` and ``wanted`` are format strings: they take ``failed`` and ``checks``, which are counts, and
        ``name``, ``value`` and ``limit`` of the check.

        Args:
            what: What happened.
            where: What was checked.
            seen: The value, left out where the check has none.
            wanted: The limit, left out where the check has none.
            fix: What to do about it, or what became of the work; by default the check's own reason.

        Raises:
            GateFailed: A check did not hold.
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
