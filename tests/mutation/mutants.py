"""Mutants of a module, made by the operators of cosmic-ray, and which part of the program each changes."""

import ast
import functools
import re
from collections.abc import Iterator
from types import CodeType

import msgspec

from tests.support.paths import ROOT

OPERATORS = (
    r"AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceContinueWithBreak",
    r"ReplaceBreakWithContinue|ReplaceUnaryOperator_Delete_(Not|Invert)|ReplaceUnaryOperator_USub_UAdd",
    r"NumberReplacer|RemoveDecorator|ExceptionReplacer|ZeroIterationForLoop",
    r"ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul|BitOr_BitAnd|BitAnd_BitOr)",
    r"ReplaceBinaryOperator_(LShift_RShift|RShift_LShift)",
    r"ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is|In_NotIn|NotIn_In)",
    r"ReplaceComparisonOperator_(Lt_LtE|Lt_Gt|LtE_Lt|LtE_GtE|Gt_GtE|Gt_Lt|GtE_Gt|GtE_LtE)",
)
"""Of cosmic-ray's 200 operators those that say the most: every other sign in place of ``+`` dies of the same tests."""


class Mutant(msgspec.Struct, frozen=True):
    """A module with one change.

    Args:
        module: Path in the repository.
        operator: Of cosmic-ray.
        occurrence: Which of the places that the operator could change.
        line: First line that is another, from 1.
        was: The lines as they are.
        now: The lines in their place.
        again: How many such changes of such lines come before it in the module.
    """

    module: str
    operator: str
    occurrence: int
    line: int
    was: tuple[str, ...]
    now: tuple[str, ...]
    again: int = 0

    @property
    def key(self) -> str:
        """The same for the same change, also when lines above it are added."""
        return "|".join((self.module, self.operator, *self.was, "→", *self.now, str(self.again)))

    def source(self) -> str:
        """The module with the change."""
        lines = (ROOT / self.module).read_text(encoding="utf-8").splitlines(keepends=True)
        assert tuple(lines[self.line - 1 : self.line - 1 + len(self.was)]) == self.was, "mutants of another version"
        lines[self.line - 1 : self.line - 1 + len(self.was)] = self.now
        return "".join(lines)


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every mutant of a module.

    Left out are changes of annotations, of what only type checkers read, and of ``strict=`` in ``zip``: without it no
    right program answers otherwise.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    text = (ROOT / module).read_text(encoding="utf-8")
    unread = list(_unread(ast.parse(text)))
    wanted = re.compile(f"core/({'|'.join(OPERATORS)})")
    for name in sorted(filter(wanted.fullmatch, operator_names())):
        occurrence = 0
        while (changed := mutate_code(text, get_operator(name)(), occurrence)) is not None:
            where = next((i for i, (a, b) in enumerate(zip(text, changed, strict=False)) if a != b), len(text))
            start = text.rfind("\n", 0, where) + 1
            place = text.count("\n", 0, where) + 1, len(text[start:where].encode())
            if changed != text and not any(first <= place < last for first, last in unread):
                yield _mutant(module, name, occurrence, text, changed)
            occurrence += 1


def _mutant(module: str, operator: str, occurrence: int, text: str, changed: str) -> Mutant:
    was, now = text.splitlines(keepends=True), changed.splitlines(keepends=True)
    first = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    while len(was) > first and len(now) > first and was[-1] == now[-1]:
        was.pop(), now.pop()
    return Mutant(module, operator, occurrence, first + 1, tuple(was[first:]), tuple(now[first:]))


def _unread(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last place (line, byte) of annotations, of blocks for type checkers and of ``strict=``."""
    for node in ast.walk(tree):
        found: list[ast.AST | None] = []
        if isinstance(node, ast.AnnAssign | ast.arg):
            found.append(node.annotation)
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            found.append(node.value)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found.append(node)
        for part in found:
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def statement(module: str, line: int) -> range:
    """Lines of the smallest statement around a line; of one with a body, its head."""
    best = range(line, line + 1)
    size = 1 << 30
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or 0):
            continue
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if body and line < body[0].lineno else node.end_lineno or 0
        if last - node.lineno < size:
            best, size = range(node.lineno, max(last, node.lineno) + 1), last - node.lineno
    return best


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and all inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from codes(const)


def within_functions(mutant: Mutant) -> bool:
    """Whether nothing changes but the bodies of functions, which can be exchanged in a running interpreter."""
    return _outside((ROOT / mutant.module).read_text(encoding="utf-8")) == _outside(mutant.source())


@functools.lru_cache
def _outside(source: str) -> list[object]:
    """What modules and bodies of classes do when they are imported."""
    optimized = 1  # CO_OPTIMIZED: functions have it, modules and bodies of classes do not
    return [
        (one.co_code, one.co_names, [repr(const) for const in one.co_consts if not isinstance(const, CodeType)])
        for one in codes(compile(source, "module", "exec"))
        if not one.co_flags & optimized
    ]
