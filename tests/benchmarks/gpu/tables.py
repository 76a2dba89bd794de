"""Results of a run as tables: each part's rows, the predictions, and the goals with pass or miss."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .goals import goals

Rows = list[dict[str, Any]]
LONGEST = 11_500
"""Maximum length of the printed tables."""


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: Title of the table.
        header: Names of the columns.
        lines: Cells.
        notes: Sentences below it.
    """

    title: str
    header: Sequence[str] = ()
    lines: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def table(document: dict[str, Any]) -> str:
    """The whole run as text for a terminal, the goals last; short enough for the end of a log."""
    last = "\n".join(as_text(states(document)) + as_text(goal_table(document)))
    room = LONGEST - len(last)
    lines = [line for part in document["parts"] for one in tables_of(part) for line in as_text(one)]
    if len("\n".join(lines)) > room:  # the kernel's table is the longest: show every second batch size
        lines = [line for part in document["parts"] for one in tables_of(_shorter(part)) for line in as_text(one)]
    text = "\n".join(lines)
    if len(text) > room:
        text = f"(the beginning is cut off here: gpu_suite.json has all)\n{text[-room + 100 :]}"
    return f"{text}\n{last}\n"


def _shorter(part: dict[str, Any]) -> dict[str, Any]:
    if part["name"] != "bandwidth":
        return part
    return part | {"rows": [row for row in part["rows"] if row.get("batch") in (None, 1, 128)]}


def as_text(one: Table) -> list[str]:
    """Aligned columns."""
    cells = [list(one.header), *map(list, one.lines)] if one.lines else []
    widths = [max(len(line[i]) for line in cells) for i in range(len(one.header))] if cells else []
    aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return [f"## {one.title}", *aligned, *one.notes]


def as_markdown(one: Table, run: str = "") -> list[str]:
    """A section of Markdown: the title, the run that it is from, the table and its notes."""
    lines = [f"### {one.title[:1].upper()}{one.title[1:]}", ""]
    if run:
        lines += [run, ""]
    if one.lines:
        lines += [_bar(one.header), _bar(["--"] * len(one.header)), *map(_bar, one.lines), ""]
    for note in one.notes:
        lines += [note, ""]
    return lines


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def states(document: dict[str, Any]) -> Table:
    """How each part ended."""
    lines = []
    for part in document["parts"]:
        failed = sum(1 for row in part["rows"] if LOST & set(row))
        seconds = "" if part.get("seconds") is None else f"{part['seconds']:.0f}"
        lines.append((part["number"], part["name"], part["state"][:60], seconds, str(len(part["rows"])), str(failed)))
    header = ("#", "part", "state", "s", "rows", "not measured")
    kind = "a dry run on the CPU: no figure means anything" if document["dry run"] else "on a GPU"
    notes = [f"library {name} does not run here: {reason[:200]}" for name, reason in document["refused"].items()]
    return Table(f"parts, {kind}; begun {document['begun']}, {document['seconds']:.0f} s", header, lines, notes)


def goal_table(document: dict[str, Any]) -> Table:
    """Target, result, pass or miss."""
    lines = [(goal.name, goal.wanted, goal.measured, goal.verdict) for goal in goals(document)]
    return Table("goals", ("goal", "wanted", "measured", ""), lines)


def tables_of(part: dict[str, Any]) -> list[Table]:
    """The tables of one part."""
    rows = part["rows"]
    found = _TABLES[part["name"]](rows) if rows and part["name"] in _TABLES else []
    lost = [
        f"{_key(row)}: {kind.replace('_', ' ')}: {str(row[kind])[:160]}"
        for row in rows for kind in ("failed", "skipped", "left_out") if kind in row
    ]  # fmt: skip
    return [*found, *([Table(f"{part['name']}: not measured", notes=[*lost[:12]])] if lost else [])]


LOST = {"failed", "skipped", "left_out"}
"""Fields of a row that were not measured."""
NAMES = (
    "library", "check", "name", "model", "how", "tool", "what", "dtype", "candidates", "channels", "batch", "again",
    "shape", "offset", "compiled", "variant",
)  # fmt: skip
"""Fields that identify a row within its part; the others are measurements."""


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    """Identifies a row, regardless of its measurements."""
    return tuple(str(row.get(name)) for name in NAMES)


def _key(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in NAMES if name in row and name != "again") or "part"


# ---- numbers


def number(value: Any, digits: int = 2) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def interval(value: Sequence[float] | None, digits: int = 2) -> str:
    """``1.45 [1.44, 1.46]``."""
    if value is None:
        return "–"
    middle, low, high = value
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def percent(value: Sequence[float] | None) -> str:
    """Formats a ratio of times as an increase: ``+1.2 % [0.9, 1.5]``."""
    if value is None:
        return "–"
    middle, low, high = (100 * (each - 1) for each in value)
    return f"{middle:+.1f} % [{low:.1f}, {high:.1f}]"


# ---- one function a part


def _ceilings(rows: Rows) -> list[Table]:
    by = {row["what"]: row for row in rows if "what" in row}
    machine, lines = by.get("machine", {}), []
    if "terabytes a second" in by.get("copy", {}):
        lines.append(("copy on the device, TB/s", number(by["copy"]["terabytes a second"]), "3.0"))
    for kind in ("bf16", "fp16"):
        if f"{kind} teraflops" in by.get("gemm", {}):
            lines.append((f"{kind} GEMM of 8192³, TFLOP/s", number(by["gemm"][f"{kind} teraflops"], 0), ""))
    if "microseconds" in by.get("empty node", {}):
        lines.append(("empty node of a graph, µs", number(by["empty node"]["microseconds"]), ""))
    for name, value in by.get("bus", {}).items():
        if name.endswith("ms"):
            predicted = "14 to 23 with conversion" if name.startswith("fp32 page") else ""
            lines.append((f"host to device, {by['bus'].get('batch')} images, {name}", number(value), predicted))
    about = [f"{machine.get('gpu', 'CPU')}, driver {machine.get('driver')}, {machine.get('versions')}"]
    about += machine.get("clocks", []) if isinstance(machine.get("clocks"), list) else []
    return [Table("ceilings", ("what", "measured", "predicted"), lines, about if machine else [])]


def _truth(rows: Rows, title: str = "truth: the kernel against the oracle and the host's bits") -> list[Table]:
    lines, notes = [], []
    for row in rows:
        if "wrong" in row:
            wrong = row["wrong"]
            bad = len(wrong) if isinstance(wrong, list) else int(wrong)
            of = {"cases": f"{row.get('cases')} cases", "batches": "batches 1, 7, 256"}.get(row["check"])
            of = of or f"{row.get('calls')} calls, {row.get('rounds')} times"
            where = f"off by {row['offset']}" if "offset" in row else str(row.get("shape", ""))
            lines.append((row["library"], row["check"], row["dtype"], where, of, str(bad)))
            if bad and isinstance(wrong, list):
                notes += [f"WRONG: {row['library']} {row['check']} {row['dtype']}: {'; '.join(wrong)}"]
        elif "answer" in row:
            notes.append(f"{row['library']}: null idx: {row['answer']}")
        elif "equal" in row:
            notes.append(f"{row['library']}: token_reorg() has the kernel's bits in {row['equal']} of {row['cases']}")
    good = [line for line in lines if line[-1] == "0"]
    if len(good) > 8:  # one line for all passing rows
        lines = [line for line in lines if line[-1] != "0"]
        notes.insert(0, f"right: {len(good)} of {len(good) + len(lines)} checks")
    return [Table(title, ("library", "check", "dtype", "where", "of", "wrong"), lines, notes)]


def _capture(rows: Rows) -> list[Table]:
    return _truth(rows, "capture: all cases in one graph, on two streams, on another stream")


def _sanitizers(rows: Rows) -> list[Table]:
    lines = [
        (row["tool"], str(row["calls"]), str(row.get("exit")), str(len(row["wrong"])), number(row.get("seconds"), 0),
         "; ".join([*row["summary"], *row["wrong"]])[:90])
        for row in rows if "wrong" in row
    ]  # fmt: skip
    return [Table("compute-sanitizer", ("tool", "calls", "exit", "wrong answers", "s", "said"), lines)]


def _bandwidth(rows: Rows) -> list[Table]:
    measured = [row for row in rows if "microseconds" in row]
    names = list(measured[0]["of copy"]) if measured else []
    header = [
        "dtype",
        "N",
        "C",
        "batch",
        "MB",
        *(f"{name}, µs" for name in names),
        *(f"{name} of copy" for name in names),
    ]
    lines = []
    for row in measured:
        times = row["microseconds"]
        lines.append([
            row["dtype"], str(row["candidates"]), str(row["channels"]), str(row["batch"]), number(row["megabytes"], 1),
            *(number(times[name]) for name in names),
            *(f"{100 * row['of copy'][name][0]:.0f} %" for name in names),
            f"{row['eager over kernel'][0]:.1f}", number(row.get("torch.compile over kernel", [None])[0], 1),
            number(times["empty node"]),
        ])  # fmt: skip
    header += ["eager /", "compile /", "empty, µs"]
    return [Table("the kernel against a copy of the same bytes", header, lines, [_KERNEL_PREDICTED])]


_KERNEL_PREDICTED = (
    "predicted for the kernel that ranked first: 79 % of copy at batch 64 to 128, 91 % at 256 (C 384), 82 % at N 576, "
    "5 to 6 µs at batch 1; with the first loads before the ranking 97 to 99 %"
)


def _graphs(rows: Rows) -> list[Table]:
    title = "DeiT-S in CUDA graphs, resident images: how many times as fast as dense, and over the slice twin"
    return [Table(title, _GRAPH_HEADER, _graph_lines(rows), _graph_notes(rows))]


_GRAPH_HEADER = (
    "",
    "batch",
    "dense, ms",
    "dense, img/s",
    "0.9",
    "0.7",
    "0.5",
    "0.7 / slice",
    "0.5 / slice",
    "body / 0.7",
)


def _graph_lines(rows: Rows) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = []
    for row in rows:
        if "speed-up" not in row:
            continue
        faster, over, body = row["speed-up"], row.get("over slice", {}), row.get("over body", {})
        kernel = body.get("0.7")
        kind = f"{row['dtype']} {row['how']}" if "how" in row else row["dtype"]
        name = kind if row["model"].startswith("deit_small") else f"{row['model'].split('_patch')[0]} {kind}"
        lines.append((
            name, str(row["batch"]), number(row["ms"].get("dense"), 3),
            number(row["images a second"].get("dense"), 0),
            *(interval(faster.get(rate)) for rate in ("0.9", "0.7", "0.5")),
            percent(over.get("0.7")), percent(over.get("0.5")), "–" if kernel is None else number(1 / kernel[0], 3),
        ))  # fmt: skip
    return lines


def _graph_notes(rows: Rows) -> list[str]:
    notes = [
        "predicted: FP16 at 128 dense 5 ms, 0.7 3.4 ms (1.45 to 1.5), 0.5 2.7 ms; at 1 dense 0.5 to 0.6 ms, 0.7 gains "
        "little. Published, A100, FP16, batch 1024: dense 5,039 img/s"
    ]
    return notes + _tried(rows) + _calls(rows)


def _tried(rows: Rows) -> list[str]:
    """Whether cuDNN benchmarked its convolutions, which earlier runs disabled."""
    known = {row.get("convolutions tried out", False) for row in rows if not LOST & set(row)}
    return [_CONVOLUTIONS[known.pop()]] if len(known) == 1 else []


_CONVOLUTIONS = {
    True: "cuDNN tried out its convolutions (torch.backends.cudnn.benchmark), as in the product's runtimes",
    False: "cuDNN took its first choice of convolution (torch.backends.cudnn.benchmark was off)",
}


def _calls(rows: Rows) -> list[str]:
    """Calls of our operators: each result once, with its first occurrence."""
    notes: dict[str, str] = {}
    for row in rows:
        if "kernel calls" in row:
            told = "; ".join(
                f"{name} {', '.join(f'{count} {op}' for op, count in calls.items()) or 'none'}"
                if isinstance(calls, dict) else f"{name} {calls}"  # only the kernel's were counted once
                for name, calls in row["kernel calls"].items()
            )  # fmt: skip
            notes.setdefault(told, f"calls of our operators in a forward pass ({_key(row)}): {told}")
    return list(notes.values())


def _paper(rows: Rows) -> list[Table]:
    published = {"dense": 2923, "0.7": 4385, "0.5": 5408}
    lines = []
    for row in rows:
        if "official over ours" not in row:
            continue
        for name in ("dense", "0.7", "0.5"):
            own = row["over its own dense"].get(f"{name} official")
            tf32 = row["dtype"] == "tf32"
            lines.append((
                row["dtype"], str(row["batch"]), name, number(row["images a second"][name], 0),
                interval(row["speed-up"].get(name)), number(row["images a second"][f"{name} official"], 0),
                interval(own),
                interval(row["official over ours"][name]), number(published[name], 0) if tf32 else "",
                number(published[name] / published["dense"]) if tf32 else "",
            ))  # fmt: skip
    header = ("", "batch", "rate", "img/s", "over dense", "official, img/s", "over its dense", "official / ours",
              "paper, img/s", "paper")  # fmt: skip
    return [
        Table(
            "eager, a hundred calls and one synchronization (the paper's protocol in TF32)", header, lines, _tried(rows)
        )
    ]


def _larger(rows: Rows) -> list[Table]:
    notes = ["Paper, DeiT-B, A100: 0.7 1.59, 0.5 1.92", *_tried(rows)]
    return [Table("larger models in CUDA graphs, FP16", _GRAPH_HEADER, _graph_lines(rows), notes)]


def _training(rows: Rows) -> list[Table]:
    lines, notes = [], []
    for row in rows:
        if "speed-up" in row:
            lines += [
                (row["how"], name, number(row["ms"][name], 1), number(row["images a second"][name], 0),
                 interval(row["speed-up"].get(name)), number(row["megabytes of a step"][name], 0),
                 number(row["ms the host takes to start one"][name], 1))
                for name in row["ms"]
            ]  # fmt: skip
        elif isinstance(row.get("calls"), dict):
            notes.append(f"calls of the kernel in a forward pass: {row['calls']}")
    notes += _tried([row for row in rows if "speed-up" in row]) + _calls(rows)
    header = ("", "model", "ms", "img/s", "over dense", "MB of a step", "host, ms")
    return [Table("a training step, BF16 autocast, resident bytes", header, lines, notes)]


def _tests(rows: Rows) -> list[Table]:
    kinds = ("passed", "failure", "error", "skipped")
    summary = [
        f"exit {row['exit']}, {row['seconds']} s: {', '.join(f'{row[kind]} {kind}' for kind in kinds if kind in row)}"
        for row in rows if "exit" in row
    ]  # fmt: skip
    bad = [row for row in rows if row.get("outcome") in ("failure", "error")]
    notes = [f"{row['outcome']}: {row['test']}: {row['reason'][:100]}" for row in bad[:12]]
    return [Table("pytest -m gpu", notes=[*summary, *notes])]


def _commands(rows: Rows) -> list[Table]:
    lines = [(row["name"], str(row["exit"]), number(row["seconds"], 1), " ".join(row["tail"].split())[-110:])
             for row in rows if "command" in row]  # fmt: skip
    return [Table("as a user", ("command", "exit", "s", "said last"), lines)]


def _profile(rows: Rows) -> list[Table]:
    measured = [row for row in rows if "ms of kernels" in row]
    if not measured:
        return []
    kinds = list(measured[0]["microseconds"])
    lines = []
    for row in measured:
        times = (number(row[name], 3) for name in ("ms in a graph", "ms of kernels", "ms between them"))
        each = (f"{row['microseconds'][kind]:,.0f} ({row['calls'][kind]:.0f})" for kind in kinds)
        lines.append((row["variant"], str(row["batch"]), *times, *each))
    header = ("", "batch", "graph, ms", "kernels, ms", "between, ms", *kinds)
    sources = sorted({row["durations of"] for row in measured})
    notes = [f"microseconds (calls) of one forward pass; durations of: {', '.join(sources)}", *_tried(measured)]
    large = [row for row in measured if row["batch"] == max(row["batch"] for row in measured)]
    found = [Table("where the time of a forward pass goes, DeiT-S, FP16", header, lines, notes), _layers(large)]
    for row in large:
        if row["variant"] == "0.7":
            longest = [(number(one["microseconds"], 0), number(one["calls"], 0), one["kind"], one["name"])
                       for one in row["longest"]]  # fmt: skip
            title = f"the longest kernels, 0.7 at batch {row['batch']}"
            found.append(Table(title, ("µs", "calls", "kind", "name"), longest))
    return found


def _layers(rows: Rows) -> Table:
    """Microseconds of one block's attention and linear layers by how many tokens they see."""
    lines, seen = [], set()
    for row in rows:
        for tokens in dict.fromkeys(key.rpartition(" ")[2] for key in row["linear"] if not key.startswith("head")):
            if tokens in seen:
                continue
            seen.add(tokens)
            each = [one["microseconds"] for one in row["attention"] if str(one["tokens"]) == tokens]
            layers = [row["linear"].get(f"{name} at {tokens}") for name in ("qkv", "proj", "fc1", "fc2")]
            lines.append((
                row["variant"], tokens, number(sum(each) / len(each) if each else None, 1),
                *("–" if one is None else f"{one['microseconds']:,.1f} ({one['teraflops']:,.0f})" for one in layers),
            ))  # fmt: skip
    title = f"attention and linear layers of one block by tokens, batch {rows[0]['batch']}: µs (TFLOP/s)"
    return Table(title, ("seen in", "tokens", "attention", "qkv", "proj", "fc1", "fc2"), lines)


def _methods(rows: Rows) -> list[Table]:
    lines = []
    for row in rows:
        name = row["method"]
        over_dense, over_slice = row["speed-up"][name][0], row["over slice"][name][0]
        lines.append((
            str(row["batch"]), name, f"{row['gmacs']:.2f}", f"{row['mac ratio']:.2f}", f"{row['ms'][name]:.3f}",
            f"{over_dense:.2f}", f"{100 * (over_slice - 1):+.1f} %",
        ))  # fmt: skip
    columns = ("batch", "method", "GMACs", "MAC ratio", "ms", "over dense", "over slice")
    return [Table("methods: DeiT-S in FP16, CUDA graphs", columns, lines)]


_TABLES: dict[str, Callable[[Rows], list[Table]]] = {
    "ceilings": _ceilings, "truth": _truth, "capture": _capture, "sanitizers": _sanitizers, "bandwidth": _bandwidth,
    "inference": _graphs, "paper": _paper, "larger": _larger, "training": _training, "tests": _tests,
    "commands": _commands, "profile": _profile, "methods": _methods,
}  # fmt: skip
