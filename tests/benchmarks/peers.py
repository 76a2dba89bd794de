"""DeiT-S converted by other tools and by ours, in one run: cost of conversion, speed and answers.

    python tests/benchmarks/peers.py --environments .peers --out docs/results/peers.json

All peers convert the same folder of weights, each in an environment that is created here with pinned versions and kept
for later runs. Conversion times are those of whole commands, in wall and CPU seconds, because machines are shared. Then
all files take turns in ONNX Runtime (`torch.compile`: in PyTorch) on one thread; ratios compare that thread's CPU times
within a round. Answers are compared with PyTorch's dense model on digits-in-the-wild. All use the same 64 pictures for
calibration.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SCRIPTS = Path(__file__).parent / "peer"
PINS = {
    "optimum": (
        "optimum-onnx==0.1.0",
        "transformers==4.57.6",
        "torch==2.13.0",
        "onnx==1.23.2",
        "onnxruntime==1.32.0",
        "pillow==13.0.0",
        "accelerate==1.15.0",
    ),
    "nncf": ("nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0"),
    "modelopt": ("nvidia-modelopt[onnx]==0.47.0", "torch==2.13.0"),
}
"""Environment -> installed packages."""
SHOWN = ("optimum", "optimum-onnx", "transformers", "torch", "nncf", "nvidia-modelopt", "onnx", "onnxruntime",
         "onnxruntime-gpu")  # fmt: skip
BATCHES = (1, 8)
CALIBRATION, PICTURES = 64, 32
REFERENCE = "Optimum, dense"
OWN = ""
"""The environment that runs this script."""


class Peer(NamedTuple):
    """One way to convert the model.

    Args:
        name: Name in the table.
        environment: Key of :data:`PINS`, or :data:`OWN`.
        command: Arguments for the environment's Python; ``{work}`` is the shared folder.
        made: The file that it writes to that folder; empty for a program in memory.
    """

    name: str
    environment: str
    command: tuple[str, ...]
    made: str


_CONVERT = ("-m", "evit_deploy", "convert", "{work}/weights", "--target", "onnx", "--threads", "1", "--quiet")
_INT8 = (*_CONVERT, "--precision", "int8", "--calibration", "{work}/pictures")
_EXPORT = ("-m", "optimum.commands.optimum_cli", "export", "onnx", "-m", "{work}/weights", "--task",
           "image-classification")  # fmt: skip
PEERS = (
    Peer(REFERENCE, "optimum", (*_EXPORT, "{work}/optimum"), "optimum/model.onnx"),
    Peer("Optimum, dense, --optimize O2", "optimum", (*_EXPORT, "--optimize", "O2", "{work}/optimum-o2"),
         "optimum-o2/model.onnx"),
    Peer("timm, plain export", OWN, (f"{SCRIPTS}/timm_export.py", "{work}/weights", "{work}/plain.onnx"), "plain.onnx"),
    Peer("torch.compile", OWN, (f"{SCRIPTS}/compile_model.py", "{work}/weights", "default"), ""),
    Peer("torch.compile, weights frozen", OWN, (f"{SCRIPTS}/compile_model.py", "{work}/weights", "frozen"), ""),
    Peer("Optimum, dense, INT8 (dynamic)", "optimum",
         ("-m", "optimum.commands.optimum_cli", "onnxruntime", "quantize", "--onnx_model", "{work}/optimum",
          "--avx512_vnni", "--per_channel", "-o", "{work}/optimum-int8"), "optimum-int8/model_quantized.onnx"),
    Peer("NNCF, dense, INT8", "nncf", (f"{SCRIPTS}/nncf_int8.py", "{work}/optimum/model.onnx",
                                       "{work}/calibration.npy", "{work}/nncf.onnx"), "nncf.onnx"),
    Peer("ModelOpt, dense, INT8", "modelopt",
         ("-m", "modelopt.onnx.quantization", "--onnx_path", "{work}/optimum/model.onnx", "--quantize_mode", "int8",
          "--calibration_data", "{work}/calibration.npy", "--calibration_eps", "cpu", "--high_precision_dtype", "fp32",
          "--output_path", "{work}/modelopt.onnx"), "modelopt.onnx"),
    Peer("ours, dense", OWN, (f"{SCRIPTS}/own_export.py", "{work}/weights", "{work}/own.onnx"), "own.onnx"),
    Peer("ours, EViT 0.7", OWN, (f"{SCRIPTS}/own_export.py", "{work}/weights", "{work}/own-k0.7.onnx", "0.7"),
         "own-k0.7.onnx"),
    Peer("ours, EViT 0.7, whole `convert`", OWN, (*_CONVERT, "--keep-rate", "0.7", "--out", "{work}/own-k0.7"),
         "own-k0.7/model.onnx"),
    Peer("ours, dense, INT8, whole `convert`", OWN, (*_INT8, "--keep-rate", "1", "--out", "{work}/own-int8"),
         "own-int8/model.onnx"),
    Peer("ours, EViT 0.7, INT8, whole `convert`", OWN,
         (*_INT8, "--keep-rate", "0.7", "--out", "{work}/own-k0.7-int8"), "own-k0.7-int8/model.onnx"),
)  # fmt: skip


def environment(folder: Path, name: str) -> str | None:
    """Creates an environment, or uses the existing one.

    Args:
        folder: Folder of the environments.
        name: Key of :data:`PINS`.

    Returns:
        Why it could not be created; ``None`` on success.
    """
    place = folder / name
    noted = place / "installed.json"
    if noted.exists() and json.loads(noted.read_text())["pins"] == list(PINS[name]):
        return None
    print(f"installing {name} into {place}", flush=True)
    venv.create(place, with_pip=True, clear=True)
    pip = [python(folder, name), "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", "-q", *PINS[name]], capture_output=True, text=True, env=clean())
    if done.returncode != 0:
        return next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
    listed = subprocess.run([*pip, "list", "--format", "json"], capture_output=True, text=True, env=clean(), check=True)
    found = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    noted.write_text(json.dumps({"pins": PINS[name], "versions": {k: v for k, v in found.items() if k in SHOWN}}))
    return None


def python(folder: Path, name: str) -> str:
    """The interpreter of an environment."""
    return sys.executable if name == OWN else str(folder / name / "bin" / "python")


def clean() -> dict[str, str]:
    """Environment variables for other projects' processes: without ours, without the hub, one thread."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(command: list[str], variables: dict[str, str], log: Path) -> dict[str, Any]:
    """Runs a command to its end.

    Args:
        command: Program and arguments.
        variables: Its environment variables.
        log: File for its output.

    Returns:
        Wall and CPU seconds and peak megabytes, including child processes; or its last line as ``failed``.
    """
    started = time.perf_counter()
    outputs = [(os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
    child = os.posix_spawn(command[0], command, variables, file_actions=outputs)
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"status {status}"]
        return {"failed": lines[-1][:200]}
    return {
        "wall s": round(time.perf_counter() - started, 1),
        "cpu s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak MB": round(usage.ru_maxrss / 1e3),
    }


def make_pictures(work: Path) -> None:
    """Writes the calibration pictures as files and as an array, and the test pictures as an array."""
    import numpy as np
    from PIL import Image

    from evit_deploy.data.training.digits.wild_digits import WildDigits

    def normalized(pictures: "np.ndarray") -> "np.ndarray":
        return pictures.astype(np.float32) / 127.5 - 1  # mean and deviation 0.5, as in the weights' folder

    def drawn(split: Any, count: int) -> "np.ndarray":
        images = WildDigits(split, count, 224)
        return np.stack([np.asarray(images[index][0]) for index in range(count)])

    calibration = drawn("train", CALIBRATION)
    (work / "pictures").mkdir()
    for index, picture in enumerate(calibration):
        Image.fromarray(picture.transpose(1, 2, 0)).save(work / "pictures" / f"{index:03}.png")
    np.save(work / "calibration.npy", normalized(calibration))
    np.save(work / "test.npy", normalized(drawn("test", PICTURES)))


def convert_all(work: Path, environments: Path, missing: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Runs every peer's conversion unless the folder has its figures; reports why others cannot run."""
    noted = work / "converted.json"
    rows: dict[str, dict[str, Any]] = json.loads(noted.read_text()) if noted.exists() else {}
    for peer in PEERS:
        if peer.name in rows:
            continue
        rows[peer.name] = row = _convert(peer, work, environments, missing)
        noted.write_text(json.dumps(rows, indent=1))
        print(f"{peer.name:40}", row, flush=True)
    return {peer.name: rows[peer.name] for peer in PEERS}


def _convert(peer: Peer, work: Path, environments: Path, missing: dict[str, str]) -> dict[str, Any]:
    if peer.environment in missing:
        return {"failed": f"not installed: {missing[peer.environment]}"}
    command = [python(environments, peer.environment), *(part.format(work=work) for part in peer.command)]
    own = {**os.environ, "OMP_NUM_THREADS": "1", **compiler_cache(work)}
    log = work / f"{peer.made.replace('/', '-') or peer.command[-1]}.log"
    row = run(command, own if peer.environment == OWN else clean(), log)
    if peer.made and "failed" not in row:
        row["file MB"] = round((work / peer.made).stat().st_size / 1e6, 1)
    return row


def compiler_cache(work: Path) -> dict[str, str]:
    """Cache folder of `torch.compile`: empty for the measurement of compiling, and reused for timing."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}


def callers(work: Path, rows: dict[str, dict[str, Any]]) -> dict[str, Callable[[Any], Any]]:
    """Functions that run each peer's model on images, on one thread."""
    import onnxruntime
    import torch

    sys.path.insert(0, str(SCRIPTS))
    from compile_model import compiled

    def in_onnxruntime(path: Path) -> Callable[[Any], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]

    def in_pytorch(model: Any) -> Callable[[Any], Any]:
        def call(images: Any) -> Any:
            with torch.inference_mode():
                return model(torch.from_numpy(images)).numpy()

        return call

    found: dict[str, Callable[[Any], Any]] = {}
    for peer in PEERS:
        if "failed" in rows.get(peer.name, {"failed": "left out"}):
            continue
        if peer.made:
            found[peer.name] = in_onnxruntime(work / peer.made)
        else:
            found[peer.name] = in_pytorch(compiled(work / "weights", frozen=peer.command[-1] == "frozen"))
            for batch in BATCHES:  # compiled now, because its settings are global
                found[peer.name](_images(batch))
    return found


def _images(batch: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)


def time_all(calls: dict[str, Callable[[Any], Any]], rows: dict[str, dict[str, Any]], rounds: int) -> None:
    """Times all in turns; adds images per second and the ratio to the reference."""
    import numpy as np

    from evit_deploy.profiling.clocks.turns import in_turns
    from evit_deploy.report.statistics import median_interval

    names = list(calls)
    for batch in BATCHES:
        images = _images(batch)
        for call in calls.values():
            call(images)

        def turn(index: int, images: Any = images) -> float:
            started = time.thread_time()
            calls[names[index]](images)
            return time.thread_time() - started

        seconds = np.array(in_turns(turn, len(names), 0.0, rounds if batch == 1 else rounds // 2))
        for index, name in enumerate(names):
            ratios = seconds[:, names.index(REFERENCE)] / seconds[:, index]
            rows[name][f"batch {batch}"] = {
                "images/s": round(batch / float(np.median(seconds[:, index])), 2),
                "over the reference": [round(v, 4) for v in (float(np.median(ratios)), *median_interval(ratios))],
            }
        rows[REFERENCE].setdefault("seconds", {})[batch] = {
            name: seconds[:, index].round(5).tolist() for index, name in enumerate(names)
        }


def hold_answers(work: Path, calls: dict[str, Callable[[Any], Any]], rows: dict[str, dict[str, Any]]) -> None:
    """Adds the agreement of the answers with PyTorch's dense model."""
    import numpy as np
    import torch

    from evit_deploy import build_model, read_checkpoint

    model = build_model(read_checkpoint(work / "weights")).eval()
    batches = np.load(work / "test.npy")[:PICTURES].reshape(-1, 8, 3, 224, 224)
    with torch.inference_mode():
        truth = np.concatenate([model(torch.from_numpy(images)).numpy() for images in batches])
    center = truth.mean(axis=0)
    for name, call in calls.items():
        answers = np.concatenate([call(images) for images in batches])
        a, b = answers - center, truth - center
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        rows[name]["answers"] = {
            "same first class": float((answers.argmax(axis=1) == truth.argmax(axis=1)).mean()),
            "1 - centered cosine": float(1 - cosine.mean()),
            "largest difference": float(np.abs(answers - truth).max()),
        }


def goals(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals, and whether they were met."""
    wanted = [
        ("EViT 0.7 over Optimum's dense export", "ours, EViT 0.7", REFERENCE, {1: 1.55, 8: 1.65}),
        ("INT8 EViT 0.7 over it", "ours, EViT 0.7, INT8, whole `convert`", REFERENCE, {1: 4.0, 8: 4.0}),
        ("our dense over timm's plain export", "ours, dense", "timm, plain export", {1: 1.06, 8: 1.06}),
    ]
    seconds = rows[REFERENCE]["seconds"]
    found = []
    for text, ours, other, levels in wanted:
        for batch, level in levels.items():
            if ours in seconds[batch] and other in seconds[batch]:
                found.append(_goal(f"{text}, batch {batch}", seconds[batch][other], seconds[batch][ours], level))
    return found


def _goal(text: str, theirs: list[float], ours: list[float], level: float) -> dict[str, Any]:
    import numpy as np

    from evit_deploy.report.statistics import median_interval

    ratios = np.array(theirs) / np.array(ours)
    middle = float(np.median(ratios))
    interval = [round(end, 4) for end in median_interval(ratios)]
    return {"goal": text, "wanted": level, "found": round(middle, 4), "interval": interval,
            "verdict": "met" if middle >= level else "MISS"}  # fmt: skip


def print_table(rows: dict[str, dict[str, Any]], met: list[dict[str, Any]]) -> None:
    """The table in docs/results-tools.md."""
    print("\n| | convert: s, of the CPU, peak MB | file MB | batch 1: images/s, over Optimum's | batch 8 | same class, "
          "1 − centered cosine |\n|---|---|---|---|---|---|")  # fmt: skip
    for name, row in rows.items():
        if "failed" in row:
            print(f"| {name} | {row['failed']} | | | | |")
            continue
        cells = [f"{row['wall s']:.0f}, {row['cpu s']:.0f}, {row['peak MB']}", f"{row.get('file MB', '')}"]
        for batch in BATCHES:
            middle, low, high = row[f"batch {batch}"]["over the reference"]
            cells.append(f"{row[f'batch {batch}']['images/s']:.1f}, {middle:.2f}× [{low:.2f}, {high:.2f}]")
        answers = row["answers"]
        cells.append(f"{100 * answers['same first class']:.1f} %, {answers['1 - centered cosine']:.1e}")
        print(f"| {name} |", " | ".join(cells), "|")
    print()
    for goal in met:
        print(f"{goal['verdict']:4} {goal['goal']}: {goal['found']} {goal['interval']}, wanted {goal['wanted']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=Path(".peers"), help="folder of the peers' environments")
    parser.add_argument("--rounds", type=int, default=30, help="at batch 1; at batch 8 half as many")
    parser.add_argument("--only", nargs="+", choices=[peer.name for peer in PEERS], metavar="NAME",
                        help="of the peers that were converted, those to time, beside the first")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="folder to leave all files in; they are used if they are there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    environments = options.environments.absolute()
    why = {name: environment(environments, name) for name in PINS}
    missing = {name: reason for name, reason in why.items() if reason}
    if "optimum" in missing:
        sys.exit(f"Optimum makes the weights and is what others are held against: {missing['optimum']}")
    with tempfile.TemporaryDirectory() as folder:
        work = (options.keep or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "test.npy").exists():
            making = [python(environments, "optimum"), f"{SCRIPTS}/make_weights.py", str(work / "weights")]
            subprocess.run(making, check=True, env=clean())
            # Not in this process: a child's peak memory includes that of its parent at the start.
            itself = [sys.executable, "-c", "import pathlib, sys; from peers import make_pictures as make; "
                      "make(pathlib.Path(sys.argv[1]))", str(work)]  # fmt: skip
            subprocess.run(itself, check=True, cwd=Path(__file__).parent)
        rows = convert_all(work, environments, missing)
        rows = {name: row for name, row in rows.items() if name in (REFERENCE, *(options.only or rows))}
        os.environ.update({"OMP_NUM_THREADS": "1", **compiler_cache(work)})
        calls = callers(work, rows)
        time_all(calls, rows, options.rounds)
        hold_answers(work, calls, rows)
    met = goals(rows)
    print_table(rows, met)
    from common import save  # imported after all children, because it loads PyTorch

    installed = {name: json.loads((environments / name / "installed.json").read_text())["versions"]
                 for name in PINS if name not in missing}  # fmt: skip
    installed["ours"] = {name: importlib.metadata.version(name) for name in ("torch", "timm", "onnx", "onnxruntime")}
    save(options.out, {"peers": rows, "goals": met, "environments": installed, "rounds": options.rounds,
                       "calibration": CALIBRATION, "pictures": PICTURES})  # fmt: skip


if __name__ == "__main__":
    main()
