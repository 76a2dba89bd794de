"""Whether the tests notice when the code is wrong: mutants of some modules, and the tests that kill them.

    python -m tests.mutation make FOLDER                 # the mutants: needs cosmic-ray
    python -m tests.mutation run FOLDER [MODULE...]      # tries those that have no result; can be stopped
    python -m tests.mutation again FOLDER [MODULE...]    # tries the survivors again, after tests were added
    python -m tests.mutation report FOLDER               # scores and survivors

``tests/mutation/README.md`` has the scores and says of each survivor why it lives.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import msgspec

from tests.mutation import running
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.running import Result, judge

MODULES = {
    "evit_deploy/tokens/operators/token_reorg.py": (
        "tokens/operators/test_token_reorg.py", "tokens/operators/test_torch_ops.py", "export/test_portable.py",
    ),
    "evit_deploy/tokens/plan.py": (
        "tokens/test_plan.py", "tokens/test_choices.py", "tokens/test_ending.py", "report/test_html.py",
    ),
    "evit_deploy/tokens/reduce.py": (
        "tokens/test_reduce.py", "tokens/test_reduce_refusals.py", "tokens/test_methods.py",
        "tokens/test_evit_options.py", "tokens/test_merge_method.py", "tokens/test_dynamicvit.py",
    ),
    "evit_deploy/verification/golden.py": ("verification/test_golden.py", "verification/test_golden_file.py"),
    "evit_deploy/verification/verify.py": (
        "verification/test_verify.py", "verification/test_verify_precision.py", "verification/test_verify_runtimes.py",
        "verification/test_trust.py",
    ),
    "evit_deploy/verification/agreement.py": ("verification/test_golden.py",),
    "evit_deploy/verification/answers/answers.py": ("verification/answers/test_cost.py", "verification/test_golden.py"),
    "evit_deploy/verification/tolerances.py": ("verification/test_tolerances.py",),
    "evit_deploy/bundle/bundle.py": ("bundle/test_bundle.py", "pages/test_page.py"),
    "evit_deploy/bundle/manifest.py": (),
    "evit_deploy/bundle/signature.py": ("bundle/test_signature.py",),
}  # fmt: skip
"""Modules, and the tests that each adds to those that are tried: any test may kill a mutant of any module."""


def mutants_in(folder: Path) -> list[Mutant]:
    """The mutants of a run, those first that come first in its random order."""
    found = msgspec.json.decode((folder / "mutants.json").read_bytes(), type=list[Mutant])
    random.Random(0).shuffle(found)
    return found


def results_in(folder: Path) -> dict[str, Result]:
    """The last result of each mutant."""
    file = folder / "results.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    return {result.key: result for result in (msgspec.json.decode(line, type=Result) for line in lines)}


def make(folder: Path, modules: list[str]) -> None:
    """Makes the mutants; of modules that were not named those of before stay."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mutants.json"
    old = msgspec.json.decode(file.read_bytes(), type=list[Mutant]) if file.exists() else []
    found = [mutant for mutant in old if mutant.module not in modules]
    for module in modules:
        begun = time.monotonic()
        one: dict[str, Mutant] = {}
        for mutant in sorted(mutants_of(module), key=lambda mutant: mutant.line):
            while mutant.key in one:
                mutant = msgspec.structs.replace(mutant, again=mutant.again + 1)
            one[mutant.key] = mutant
        found += one.values()
        print(f"{module}: {len(one)} mutants, {time.monotonic() - begun:.0f} s", flush=True)
    file.write_bytes(msgspec.json.encode(found))


def report(folder: Path) -> None:
    """Prints scores and survivors."""
    results = results_in(folder)
    print("| module | mutants | tried | killed | timeout | survived | unreached | score |")
    print("|---|---|---|---|---|---|---|---|")
    mutants = sorted(mutants_in(folder), key=lambda mutant: (mutant.module, mutant.line, mutant.operator))
    for module in dict.fromkeys(mutant.module for mutant in mutants):
        own = [mutant for mutant in mutants if mutant.module == module]
        outcomes = [results[mutant.key].outcome for mutant in own if mutant.key in results]
        count = [outcomes.count(name) for name in ("killed", "timeout", "survived", "unreached")]
        score = f"{sum(count[:2]) / len(outcomes):.1%}" if outcomes else ""
        print(f"| {module} | {len(own)} | {len(outcomes)} | {' | '.join(map(str, count))} | {score} |")
    print()
    for mutant in mutants:
        result = results.get(mutant.key)
        if result is not None and result.outcome in ("survived", "unreached"):
            operator = mutant.operator.removeprefix("core/")
            print(f"{mutant.module}:{mutant.line} {operator}: {result.outcome}, {result.tests} tests")
            for sign, lines in (("-", mutant.was), ("+", mutant.now)):
                print("".join(f"  {sign} {line.rstrip()}\n" for line in lines), end="")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("what", choices=("make", "run", "again", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(MODULES))
    parser.add_argument("--count", type=int, help="how many mutants to try")
    parser.add_argument("--seconds", type=float, default=10, help="how long the tests of a mutant may take [10]")
    given = parser.parse_args()
    folder, modules = given.folder.resolve(), given.modules or list(MODULES)
    if given.what == "make":
        make(folder, modules)
    elif given.what == "report":
        report(folder)
    else:
        results = results_in(folder)
        alive = {key for key, result in results.items() if result.outcome in ("survived", "unreached")}
        left = [mutant for mutant in mutants_in(folder) if mutant.module in modules]
        left = [m for m in left if (m.key in alive if given.what == "again" else m.key not in results)]
        tests = [f"tests/{file}" for files in MODULES.values() for file in files]
        running.SECONDS = given.seconds
        judge(left[: given.count], list(MODULES), tests, folder)


if __name__ == "__main__":
    sys.exit(main())
