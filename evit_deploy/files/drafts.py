"""Drafts: hidden folders in which something is made, and which it leaves for its place in one step.

A draft is ``.evit-deploy-<random>`` beside the place. Its owner holds a lock on a file in it, which the kernel takes
away when the process ends, however it ends; so the next draft beside it finds what the dead left, by no clock and no
process number, and removes it. What the living own stays, and everything where the file system has no locks.

A file or folder is on the disk before it moves, and its move is before :meth:`Draft.publish` returns. A folder that
takes the place of another one does so by ``renameat2``, which exchanges the two. Where the kernel or the file system
does not have it, the old folder is moved aside first; a process that dies between the two moves leaves the old one in
its draft, and the next draft, or :func:`sweep`, puts it back.
"""

import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".evit-deploy-"
_NOT_OWNED = ".not-owned-evit-deploy-"  # where the file system has no locks: no one can know whether these are in use
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)  # EPERM: what some sandboxes say for ENOSYS
_TRIES = 100
# What linux/fs.h and fcntl.h call RENAME_NOREPLACE, RENAME_EXCHANGE and AT_FDCWD.
_ONLY_IF_FREE, _EXCHANGE, _FROM_HERE = 1, 2, -100


class Draft:
    """A folder in the making; see :func:`draft`.

    Args:
        room: The hidden folder. It holds ``lock``, ``new`` and, while one folder replaces another, ``old/<name>``.
    """

    def __init__(self, room: Path) -> None:
        self._room = room
        self.folder = room / "new"
        """An empty folder to make things in."""

    def publish(self, made: Path, place: Path, *, replace: bool) -> None:
        """Moves something to its place in one step, and returns when it is on the disk.

        Args:
            made: :attr:`folder`, or a file or folder in it.
            place: Where it goes, beside the draft.
            replace: Whether a folder takes the place of what is there. A file does so always, though never of a folder.

        Raises:
            FileExistsError: Something is there that is not replaced. ``made`` stays where it is.
            OSError: It cannot be written or moved; what was there still is, at the latest when the draft is closed.
        """
        _sync_all(made)
        if not made.is_dir():
            os.replace(made, place)
        elif replace:
            self._replace(made, place)
        else:
            _move(made, place)
        sync(self._room)
        sync(place.parent)

    def _replace(self, made: Path, place: Path) -> None:
        for _ in range(_TRIES):  # others may put something there, or take it away, between any two steps
            try:
                if _renameat2(made, place, _EXCHANGE):
                    return
                old = self._room / "old" / place.name
                if not os.path.lexists(old):
                    old.parent.mkdir(exist_ok=True)
                    os.rename(place, old)
            except FileNotFoundError:
                pass  # nothing is there (any more)
            with suppress(FileExistsError):
                _move(made, place)
                return
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))


@contextmanager
def draft(parent: Path | None = None) -> Iterator[Draft]:
    """Opens a draft, and removes it at the end with what was not published; first those whose owners have died.

    Args:
        parent: Where it lies, beside the places of what is made in it; by default in the folder for temporary files.

    Raises:
        OSError: No folder can be made there.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(parent)
    room, lock = _own(parent)
    try:
        made = Draft(room)
        made.folder.mkdir()
        yield made
    finally:
        try:
            _discard(room)
        except BaseException:  # interrupted: the second signal of the same request does not interrupt again
            _discard(room)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def sweep(parent: Path) -> None:
    """Removes the drafts in a folder whose owners have died, and puts back what they had moved aside.

    Those of other users stay, and what cannot be removed.
    """
    try:
        with os.scandir(parent) as entries:
            rooms = [parent / e.name for e in entries if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for room in rooms:
        with suppress(OSError, ImportError):
            if room.lstat().st_uid == os.geteuid():
                lock = _lock(room)
                try:
                    _discard(room)
                finally:
                    os.close(lock)


def sync(path: Path) -> None:
    """Puts a file, or what a folder says of its files, on the disk; a folder only where the file system can."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _own(parent: Path) -> tuple[Path, int | None]:
    """Makes a hidden folder, and locks it."""
    for _ in range(_TRIES):
        room = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            return room, _lock(room)
        except (BlockingIOError, FileNotFoundError):
            continue  # a sweep was faster than the lock
        except ImportError:  # a system whose Python has no such locks
            pass
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno not in _NO_LOCKS:
                _discard(room)
                raise
        _discard(room)
        return Path(tempfile.mkdtemp(prefix=_NOT_OWNED, dir=parent)), None
    raise FileExistsError(errno.EEXIST, "no draft could be locked", str(parent))


def _lock(room: Path) -> int:
    """Locks a draft until the file that it gives is closed.

    Raises:
        BlockingIOError: Its owner lives.
        FileNotFoundError: It was removed in between.
        OSError: The file system has no locks, or the draft is of another user.
    """
    import fcntl

    path = room / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), path.lstat()):  # locked what somebody else had just removed
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _discard(room: Path) -> None:
    """Removes a draft. What it had moved aside goes back where its place is free; all stays if that cannot be done."""
    try:
        for old in (room / "old").iterdir():
            with suppress(FileExistsError):
                _move(old, room.parent / old.name)
    except FileNotFoundError:
        pass  # nothing was moved aside
    except OSError:
        return
    shutil.rmtree(room, ignore_errors=True)


def _move(folder: Path, place: Path) -> None:
    """Moves a folder to a place that must be free.

    Raises:
        FileExistsError: It is not.
    """
    if _renameat2(folder, place, _ONLY_IF_FREE):
        return
    try:
        if os.path.lexists(place):
            raise FileExistsError
        os.rename(folder, place)  # onto nothing, or an empty folder that came in between: the system refuses all else
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EEXIST) or isinstance(error, FileExistsError):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
        raise


def _renameat2(one: Path, other: Path, how: int) -> bool:
    """Renames as only Linux can; whether it could.

    Raises:
        OSError: Why it failed.
    """
    call = _system_call()
    if call is None:
        return False
    import ctypes

    if call(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), how) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _system_call() -> Callable[..., int] | None:
    import ctypes  # most commands write nothing

    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or a C library without it
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call


def _sync_all(made: Path) -> None:
    """Puts a file, or a folder with all that is in it, on the disk."""
    for folder, _, names in os.walk(made):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                sync(path)
        sync(Path(folder))
    if not made.is_dir():
        sync(made)
