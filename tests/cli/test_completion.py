"""Shell completion: names of values, and files, by click's protocol and in a real bash."""

import os
import shutil
import subprocess
import sys

import pytest
import timm

from evit_deploy.cli import COMMANDS
from evit_deploy.cli.types import model_names
from evit_deploy.registry import RUNTIMES, TARGETS
from evit_deploy.tokens.backbone import load_backbones

PROGRAM = "from evit_deploy.cli import main; main()"


def completed(*words: str) -> list[tuple[str, str]]:
    """Kind and value of what is offered for the last word."""
    environment = os.environ | {
        "_EVIT_DEPLOY_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["evit-deploy", *words]),
        "COMP_CWORD": str(len(words)),
    }
    # As the installed program is called: click takes its variable's name from the name of the program.
    code = f"import sys; sys.argv[0] = 'evit-deploy'; {PROGRAM}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return [tuple(line.split(",", 1)) for line in done.stdout.splitlines()]  # type: ignore[misc]


# What a shell is asked for, by click's protocol of it: variables of the line typed so far, and the answers' lines.
ASKED = {
    "bash": lambda words: ({"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}, "plain,{}"),
    "zsh": lambda words: ({"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}, "plain\n{}\n"),
    "fish": lambda words: ({"COMP_WORDS": " ".join(words), "COMP_CWORD": words[-1]}, "plain,{}"),
}


def asked(instruction: str, **variables: str) -> str:
    code = f"import sys; sys.argv[0] = 'evit-deploy'; {PROGRAM}"
    environment = os.environ | {"_EVIT_DEPLOY_COMPLETE": instruction} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ASKED)
def test_every_shell_has_a_script(shell):
    script = asked(f"{shell}_source")
    assert f"_EVIT_DEPLOY_COMPLETE={shell}_complete" in script
    assert "_evit_deploy_completion" in script
    assert "evit-deploy" in script


@pytest.mark.parametrize("shell", ASKED)
@pytest.mark.parametrize(
    ("words", "name"), [(["prof"], "profile"), (["convert", "a.pth", "--method", "dyn"], "dynamicvit")]
)
def test_every_shell_completes_a_command_and_a_method(shell, words, name):
    variables, form = ASKED[shell](["evit-deploy", *words])
    assert form.format(name) in asked(f"{shell}_complete", **variables)


def values(*words: str) -> list[str]:
    return [value for _, value in completed(*words)]


def test_commands_and_options():
    assert values("p") == [name for name in COMMANDS if name.startswith("p")]
    assert values("predict", "bundle", "--t") == ["--top", "--threads"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["predict", "one", "a.png", "--runtime", "onnx"], [n for n in RUNTIMES.own_names() if n.startswith("onnx")]),
        (["verify", "one", "--runtime", "t"], [n for n in RUNTIMES.own_names() if n.startswith("t")]),
        (["convert", "a.pth", "--target", ""], TARGETS.own_names()),
        (["convert", "a.pth", "--precision", "fp"], ["fp32", "fp16", "fp8"]),
        (["convert", "a.pth", "--method", "e"], ["evit", "evo-vit"]),
    ],
)  # fmt: skip
def test_values_of_options(words, names):
    assert names
    assert values(*words) == names


@pytest.mark.parametrize("words", [["predict", "de"], ["predict", "bundle", "ho"], ["verify", ""], ["profile", "de"],
                                   ["convert", "de"], ["compare", "one", "tw"]])  # fmt: skip
def test_bundles_and_files_are_left_to_the_shell(words):
    assert completed(*words) == [("file", words[-1])]


def test_architectures():
    found = values("convert", "a.pth", "--model", "deit_small")
    assert found == ["deit_small_distilled_patch16_224", "deit_small_patch16_224"]


def test_the_architectures_are_those_that_timm_registers():
    load_backbones()
    known = set(timm.list_models())
    names = model_names()
    assert set(names) <= known
    assert {"vit_base_patch16_224", "deit3_small_patch16_224", "levit_128s", "lvvit_s"} <= set(names)
    for module in ("vision_transformer", "deit", "levit"):
        assert set(timm.list_models(module=module)) <= set(names)


def test_a_real_bash_completes(tmp_path):
    """The lines that the documentation names, in a shell that has a program called evit-deploy."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    program = tmp_path / "bin" / "evit-deploy"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{PROGRAM}\n")
    program.chmod(0o755)
    script = """
        eval "$(_EVIT_DEPLOY_COMPLETE=bash_source evit-deploy)"
        offer() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _evit_deploy_completion evit-deploy
                  echo "${COMPREPLY[@]}"; }
        compopt() { printf "compopt %s %s\\n" "$@"; }
        complete -p evit-deploy
        offer evit-deploy convert a.pth --target open
        offer evit-deploy predict deit
    """
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [bash, "--norc", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    registered, target, folder, *_ = done.stdout.splitlines()
    assert registered.startswith("complete -o nosort -F _evit_deploy_completion evit-deploy"), done.stderr
    assert target == "openvino"
    assert folder == "compopt -o default"  # bash itself lists folders and files
