"""All errors that evit-deploy raises, with their exit codes on the command line.

::

    EvitDeployError            4   base; also "a stage failed"
    ├── InputError             2   an option, a file or an argument cannot be used (also a ValueError)
    │   ├── CheckpointError    2   a checkpoint cannot be read or does not fit
    │   ├── RecipeError        2   a recipe cannot be read or asks for something impossible
    │   └── UnsupportedModelError  2   a model that cannot be reduced exactly, with the reasons
    ├── MissingRequirement     3   the environment lacks something; the message has the line that fixes it
    ├── StageError             4   a stage failed for a reason outside the input (full disk, exporter, runtime)
    └── GateFailed             1   everything ran and a check did not hold

:class:`Interrupted` is not an error: training was stopped by a signal, after it wrote a state it can resume from. The
command line exits with 130 after Ctrl-C and with 143 after SIGTERM, whatever it was doing.

A message states what happened, where, the value found, the value expected and what to do about it, in that order.
"""

import errno
from collections.abc import Iterable
from typing import NamedTuple

_LONGEST = 1500
"""Maximum length of a message before its fix; messages quote foreign text, which may have any length."""


def _cut(text: str, length: int) -> str:
    """Shortens a long text by removing its middle."""
    return text if len(text) <= length else f"{text[: length * 2 // 3]} … {text[-length // 3 + 3 :]}"


class EvitDeployError(Exception):
    """Base of all errors that evit-deploy raises on purpose.

    Args:
        what: What happened, as a clause without a full stop.
        where: File, option or field it happened at.
        seen: The value that was found.
        wanted: The value that would have been accepted.
        fix: What to do about it, as a sentence.
    """

    exit_code = 4

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        seen: object = None,
        wanted: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.seen, self.wanted, self.fix = what, where, seen, wanted, fix
        text = what if where is None else f"{_cut(str(where), _LONGEST // 3)}: {what}"
        details = [f"{label} {value}" for label, value in (("got", seen), ("expected", wanted)) if value is not None]
        if details:
            text += " (" + ", ".join(details) + ")"
        text += "." if not text.endswith((".", "?", "!")) else ""
        text = _cut(text, _LONGEST)
        fix = _cut(fix, _LONGEST // 4) if fix else fix
        super().__init__(f"{text} {fix}" if fix else text)


class InputError(EvitDeployError, ValueError):
    """An option, a file or an argument cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint cannot be read, is not a checkpoint, or does not fit the model."""


class RecipeError(InputError):
    """A recipe cannot be read or asks for something impossible."""


class UnsupportedModelError(InputError):
    """A model whose tokens cannot be reduced exactly.

    Args:
        model: Name of the model or of its class.
        reasons: Why, one clause each.
        fix: What to do about it; by default, choosing another model.
    """

    def __init__(self, model: str, reasons: list[str], fix: str | None = None) -> None:
        self.reasons = reasons
        super().__init__(
            f"{model} cannot be token-reduced exactly: " + "; ".join(reasons),
            fix=fix or "Use a timm VisionTransformer that classifies from its class token (deit, deit3, vit, dinov2).",
        )


class MissingRequirement(EvitDeployError):  # noqa: N818 -- reads as what it is; click and pip name theirs likewise
    """The environment lacks a package, a device or network access; the message contains the command that fixes it."""

    exit_code = 3


class StageError(EvitDeployError):
    """A stage failed for a reason other than its input: full disk, exporter, runtime."""

    exit_code = 4


class GateFailed(EvitDeployError):  # noqa: N818 -- a result, not a malfunction
    """Everything ran, and a check failed."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM and can be resumed: a ``KeyboardInterrupt`` with a message.

    The message states the step reached and the path of the saved state.
    """


class _Shortage(NamedTuple):
    """A resource that can run out, and how its errors are recognized."""

    what: str
    numbers: tuple[int, ...]
    texts: tuple[str, ...]
    fix: str


_FILES = _Shortage(
    "out of file descriptors", (errno.EMFILE, errno.ENFILE), ("Too many open files",),
    "Raise the limit (ulimit -n), or close what holds files open.",
)  # fmt: skip
_DISK = _Shortage(
    "no space left to write", (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    ("No space left on device", "Disk quota exceeded", "File too large"),
    "Free some space, or raise the quota; the limit of a single file is ulimit -f.",
)  # fmt: skip
_PROCESSES = _Shortage(
    "no more threads or processes may be started", (errno.EAGAIN,),
    ("can't start new thread", "pthread_create", "Resource temporarily unavailable"),
    "Raise the limit (ulimit -u), or use fewer threads and workers.",
)  # fmt: skip
_MEMORY = _Shortage(
    "not enough memory", (errno.ENOMEM,),
    ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "bad allocation", "out of memory",
     "Unable to allocate", "Failed to allocate memory", "failed to map segment"),
    "Try a smaller batch size.",
)  # fmt: skip


def exhausted(error: BaseException) -> StageError | None:
    """The error to report if something failed because memory, disk, files or processes ran out, in any library.

    Args:
        error: What was raised. An error of this package is not replaced if it already names the shortage, asks for a
            package, is a failed check, or refuses an input that needs too much memory.
    """
    known = (_FILES, _DISK, _PROCESSES, _MEMORY)
    if isinstance(error, InputError):
        known = (_FILES, _DISK)
    elif isinstance(error, EvitDeployError) and (type(error) is not StageError or any(_says(error, s) for s in known)):
        return None
    one: BaseException | None = error
    while one is not None:
        for shortage in known:
            if _shows(one, shortage):
                where = one.filename if isinstance(one, OSError) and shortage is _DISK else None
                return StageError(shortage.what, where=where, fix=shortage.fix)
        one = one.__cause__ or one.__context__
    return None


def _shows(error: BaseException, shortage: _Shortage) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in shortage.numbers
    if isinstance(error, MemoryError):
        return shortage is _MEMORY
    return _says(error, shortage)


def _says(error: BaseException, shortage: _Shortage) -> bool:
    return any(text.lower() in str(error).lower() for text in shortage.texts)


def did_you_mean(name: object, known: Iterable[str], *, prefix: str = "", choices: int = 1) -> str | None:
    """A suggestion for an unknown name; ``None`` if no known name is similar.

    >>> did_you_mean("evti", ["evit", "slice"])
    "Did you mean 'evit'?"

    Args:
        name: The unknown name.
        known: The valid names.
        prefix: Prepended to each suggested name.
        choices: Maximum number of suggestions.
    """
    import difflib  # every command imports this module, and few need this

    # A low cutoff, so that `deit_tiny` finds timm's long name and `trt` finds `tensorrt`.
    near = difflib.get_close_matches(str(name), known, n=choices, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(prefix + one) for one in near)}?" if near else None


def first_few(names: Iterable[object], count: int = 3, separator: str = ", ") -> str:
    """Joins the first names and the number of the remaining ones.

    >>> first_few(["a", "b", "c", "d"])
    'a, b, c and 1 more'

    Args:
        names: All of them.
        count: How many to name.
        separator: Put between them.
    """
    shown = [str(name) for name in names]
    return separator.join(shown[:count]) + (f" and {len(shown) - count} more" if len(shown) > count else "")
