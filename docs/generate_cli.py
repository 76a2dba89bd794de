"""Writes docs/cli.md from the commands themselves; tests fail when it is stale.

python docs/generate_cli.py
"""

from pathlib import Path

import click

from evit_deploy.cli import COMMANDS, cli

HEADER = """# Commands

Written by `python docs/generate_cli.py`. stdout carries the result, stderr progress and notices; `--json` makes the
result one JSON document. On a terminal, tables fit its width and a command ends with those that one may want next.
Exit codes: 0 ok · 1 a gate failed · 2 usage, recipe or input · 3 environment ·
4 a stage failed · 130 interrupted (Ctrl-C) · 143 terminated (SIGTERM).

The shell completes commands, options, files and folders (a bundle is a folder), and the names that options take:
`--runtime`, `--target`, `--method`, `--precision`, and timm's architectures for `--model`. One line in `~/.bashrc`
turns it on:

```bash
eval "$(_EVIT_DEPLOY_COMPLETE=bash_source evit-deploy)"
```

In `~/.zshrc` it is `eval "$(_EVIT_DEPLOY_COMPLETE=zsh_source evit-deploy)"`, and for fish
`_EVIT_DEPLOY_COMPLETE=fish_source evit-deploy | source` in `~/.config/fish/completions/evit-deploy.fish`.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEADER]
    parent = click.Context(cli, info_name="evit-deploy", terminal_width=110, **cli.context_settings)
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        assert command is not None
        parts += _pages(command, name, parent)
    return "\n".join(parts)


def _pages(command: click.Command, name: str, parent: click.Context) -> list[str]:
    context = click.Context(
        command, info_name=name.split()[-1], parent=parent, max_content_width=110, terminal_width=110
    )
    pages = [f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            part = command.get_command(context, below)
            assert part is not None
            pages += _pages(part, f"{name} {below}", context)
    return pages


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(reference(), encoding="utf-8")
