"""Writes docs/api.md, and the stub evit_deploy/__init__.pyi, from the package's list of public names, their signatures
and docstrings; tests fail when either is stale.

python docs/generate_api.py
"""

import ast
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import evit_deploy
from evit_deploy import Registry

HEADER = """# Python

Written by `python docs/generate_api.py`. Everything here is imported from the top: `import evit_deploy as ed`.

Names listed here keep their meaning within a minor version; modules inside the package may move. File formats carry a
separate version number.
"""
STUB_HEADER = '"""Written by docs/generate_api.py: the public names, for type checkers and editors."""\n\n'
_SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)
_ENTRY = re.compile(r"^(\S[^:]*):\s+(.*)", re.DOTALL)


def stub() -> str:
    """The stub, in the order of ruff's import sorting: constants, classes, functions."""
    kind = {name: (name[0].isupper() + name.isupper()) for name in evit_deploy.__all__}
    names = sorted(evit_deploy.__all__, key=lambda name: (_module(name), -kind[name], name))
    lines = [f"from {_module(name)} import {name} as {name}" for name in names]
    return STUB_HEADER + "\n".join(lines) + "\n\n__version__: str\n"


def reference() -> str:
    """The whole page."""
    parts = [HEADER]
    for stage, modules in evit_deploy._PUBLIC.items():
        parts.append(f"## {stage}\n")
        parts += [_entry(name) for names in modules.values() for name in names.split()]
    return "\n".join(parts)


def _module(name: str) -> str:
    return f"evit_deploy.{evit_deploy._MODULE_OF[name]}"


def _entry(name: str) -> str:
    value = getattr(evit_deploy, name)
    if isinstance(value, Registry):
        known = ", ".join(f"`{own}`" for own in value.own_names())
        return f"### {name}\n\nThe [registry](#registry) of {value.kind}s: {known}.\n"
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    node = _Plain(vars(sys.modules[value.__module__])).visit(node)
    parts = _class(name, node) if isinstance(node, ast.ClassDef) else _function(name, node)
    return f"### {name}\n\n" + "\n".join(part for part in parts if part)


class _Plain(ast.NodeTransformer):
    """Annotations as a caller sees them: without quotes and limits, and with what the module's own names stand for.

    Args:
        names: Of the module.
    """

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        """A field."""
        node.annotation = self._annotation(node.annotation)
        node.value = self._default(node.value)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        """Parameters."""
        node.defaults = [self._default(default) for default in node.defaults]
        node.kw_defaults = [self._default(default) for default in node.kw_defaults]
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """A parameter."""
        node.annotation = self._annotation(node.annotation) if node.annotation is not None else None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """A function."""
        node.returns = self._annotation(node.returns) if node.returns is not None else None
        node.args = self.visit(node.args)
        return node

    def _default(self, node: Any) -> Any:
        """A constant's value in place of its name."""
        value = self.names.get(node.id) if isinstance(node, ast.Name) else None
        return node if value is None or isinstance(value, type) else ast.parse(repr(value), mode="eval").body

    def _annotation(self, node: Any) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._annotation(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.Subscript):
            kind = ast.unparse(node.value)
            if kind == "Annotated" and isinstance(node.slice, ast.Tuple):
                return self._annotation(node.slice.elts[0])
            node.slice = node.slice if kind == "Literal" else self._annotation(node.slice)
        elif isinstance(node, ast.BinOp):
            node.left, node.right = self._annotation(node.left), self._annotation(node.right)
        elif isinstance(node, ast.Tuple | ast.List):
            node.elts = [self._annotation(part) for part in node.elts]
        elif isinstance(node, ast.Name) and typing.get_origin(self.names.get(node.id)) in (Annotated, Literal):
            short = self.names[node.id]
            text = f"Literal{list(typing.get_args(short))}" if typing.get_origin(short) is Literal else None
            return ast.parse(text or short.__origin__.__name__, mode="eval").body
        return node


def _function(name: str, node: Any) -> Iterator[str]:
    yield f"```python\n{_signature(name, node)}\n```\n"
    yield from _text(ast.get_docstring(node) or "")


def _class(name: str, node: ast.ClassDef) -> Iterator[str]:
    fields, doc = list(_fields(node)), ast.get_docstring(node) or ""
    made = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if made is not None:
        yield f"```python\n{_signature(name, made)}\n```\n"
    docs = dict(_arguments(doc))
    base = next((base for base in map(ast.unparse, node.bases) if base in evit_deploy.__all__), None)
    prose, *sections = _text(doc, leave_out=[field for field, *_ in fields])
    yield prose.rstrip() + (f" It has all that [{base}](#{base.lower()}) has." if base else "") + "\n"
    lines = []
    for field, annotation, default, below in fields:
        value, text = f" = {default}" if default is not None else "", below or docs.get(field, "")
        lines.append(f"- `{field}: {annotation}{value}`" + (f": {_inline(text)}" if text else "") + "\n")
    yield "".join(lines)
    yield from sections
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and not _overload(part):
            yield from _method(name, part)


def _overload(node: ast.FunctionDef) -> bool:
    """One of several forms of a signature, of which the last says it all."""
    return "overload" in {ast.unparse(mark) for mark in node.decorator_list}


def _method(owner: str, node: ast.FunctionDef) -> Iterator[str]:
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    full = f"{owner}.{node.name}"
    if "property" in marks:
        result = f": {ast.unparse(node.returns)}" if node.returns else ""
        yield f"**`{full}{result}`**\n"
    else:
        yield f"**`{_signature(full, node, width=10_000)}`**\n"
    yield from _text(ast.get_docstring(node) or "")


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str | None, str]]:
    """Name, type, default and the string below it, of every field."""
    for part, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            constant = below.value if isinstance(below, ast.Expr) else None
            text = str(constant.value) if isinstance(constant, ast.Constant) else ""
            default = ast.unparse(part.value) if part.value is not None else None
            made = re.fullmatch(r"msgspec\.field\(default_factory=dict\)", default or "")
            yield part.target.id, ast.unparse(part.annotation), "{}" if made else default, text


def _signature(name: str, node: Any, width: int = 100) -> str:
    """A call as one would write it, without self; one parameter a line where it is long."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    parts = [_parameter(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        parts = parts[1:]
    if arguments.vararg is not None:
        parts.append(f"*{_parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parts += [_parameter(arg, default) for arg, default in keywords]
    if arguments.kwarg is not None:
        parts.append(f"**{_parameter(arguments.kwarg, None)}")
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= width:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation is not None else ""
    equals = " = " if annotation else "="
    return argument.arg + annotation + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def _text(doc: str, leave_out: Sequence[str] = ()) -> Iterator[str]:
    """A docstring as Markdown: its prose, then each section.

    Args:
        doc: The docstring, without indentation.
        leave_out: Arguments that are described elsewhere.
    """
    prose, *sections = _SECTION.split(doc)
    yield _prose(prose) + "\n"
    for heading, body in zip(sections[::2], sections[1::2], strict=True):
        body = textwrap.dedent(body).strip("\n")
        if heading == "Returns":
            yield f"Returns: {_inline(body)}\n"
            continue
        entries = [f"- `{name}`: {_inline(text)}" for name, text in _entries(body) if name not in leave_out]
        if entries:
            yield "\n".join((["Raises:\n"] if heading == "Raises" else []) + entries) + "\n"


def _arguments(doc: str) -> Iterator[tuple[str, str]]:
    _, *sections = _SECTION.split(doc)
    for heading, body in zip(sections[::2], sections[1::2], strict=True):
        if heading == "Args":
            yield from _entries(textwrap.dedent(body).strip("\n"))


def _entries(body: str) -> Iterator[tuple[str, str]]:
    """``name: text`` entries, whose further lines are indented."""
    for entry in re.split(r"\n(?=\S)", body):
        found = _ENTRY.match(entry)
        if found:
            yield found[1], found[2]


def _prose(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(_example(part) if part.startswith(">>>") else _inline(part) for part in paragraphs)


def _example(text: str) -> str:
    return f"```pycon\n{text}\n```"


def _inline(text: str) -> str:
    """One paragraph of reStructuredText as Markdown on one line."""
    text = re.sub(r":[a-z]+:`~?\.?([^`]*)`", lambda found: f"`{found[1].removeprefix('evit_deploy.')}`", text)
    text = re.sub(r"`(?:[a-z_]+\.)+([A-Z]\w*)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(reference(), encoding="utf-8")
    Path(evit_deploy.__file__).with_suffix(".pyi").write_text(stub(), encoding="utf-8")
