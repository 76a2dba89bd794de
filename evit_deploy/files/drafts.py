"""Drafts: hidden folders for files in progress, which are published in one step.

A draft is named ``.evit-deploy-<random>`` and is next to its destination. Its owner holds a lock on a file in it, which
the kernel releases when the process ends for any reason. A later draft in the same folder can therefore detect and
remove those of dead processes, without relying on times or process IDs. Drafts in use are kept; so are all drafts on
file systems without locks.

A file or folder is synced to disk before it is moved, and the move is synced before :meth:`Draft.publish` returns. A
folder replaces another by ``renameat2``, which exchanges the two. If the kernel or file system does not support it, the
old folder is moved aside first; if the process dies between the two moves, the old folder remains in its draft, and the
next draft or :func:`sweep` restores it.
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
_NOT_OWNED = ".not-owned-evit-deploy-"  # on file systems without locks, where it is unknown whether a draft is in use
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
# EPERM: some sandboxes return it instead of ENOSYS
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
_TRIES = 100
# RENAME_NOREPLACE, RENAME_EXCHANGE (linux/fs.h) and AT_FDCWD (fcntl.h).
_ONLY_IF_FREE, _EXCHANGE, _FROM_HERE = 1, 2, -100


class Draft:
    """A temporary folder that can be published; see :func:`draft`.

    Args:
        room: The hidden folder. It contains ``lock``, ``new`` and, while one folder replaces another, ``old/<name>``.
    """

    def __init__(self, room: Path) -> None:
        self._room = room
        self.folder = room / "new"
        """An empty folder for new files."""

    def publish(self, made: Path, place: Path, *, replace: bool) -> None:
        """Moves a file or folder to its destination in one step, and returns when it is on the disk.

        Args:
            made: :attr:`folder`, or a file or folder in it.
            place: Its destination, next to the draft.
            replace: Whether a folder replaces an existing one. Files always replace files, and never folders.

        Raises:
            FileExistsError: The destination exists and is not replaced. ``made`` is not moved.
            OSError: It cannot be written or moved; the previous content is unchanged, or restored when the draft is
                closed.
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
        for _ in range(_TRIES):  # other processes may create or remove the destination at any time
            try:
                if _renameat2(made, place, _EXCHANGE):
                    return
                old = self._room / "old" / place.name
                if not os.path.lexists(old):
                    old.parent.mkdir(exist_ok=True)
                    os.rename(place, old)
            except FileNotFoundError:
                pass  # the destination does not exist (any more)
            with suppress(FileExistsError):
                _move(made, place)
                return
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))


@contextmanager
def draft(parent: Path | None = None) -> Iterator[Draft]:
    """Opens a draft, and removes it at the end with everything unpublished. First removes drafts of dead processes.

    Args:
        parent: Folder of the draft, which must be that of the destination; by default the folder for temporary files.

    Raises:
        OSError: The folder cannot be created.
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
        except BaseException:  # interrupted; further signals of the same request are ignored during cleanup
            _discard(room)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def sweep(parent: Path) -> None:
    """Removes drafts of dead processes in a folder, and restores what they had moved aside.

    Drafts of other users, and those that cannot be removed, are kept.
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
    """Syncs a file or a folder's entries to disk; a folder only if the file system supports it."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _own(parent: Path) -> tuple[Path, int | None]:
    """Creates a hidden folder and locks it."""
    for _ in range(_TRIES):
        room = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            return room, _lock(room)
        except (BlockingIOError, FileNotFoundError):
            continue  # swept before it was locked
        except ImportError:  # no file locks on this platform
            pass
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno not in _NO_LOCKS:
                _discard(room)
                raise
        _discard(room)
        return Path(tempfile.mkdtemp(prefix=_NOT_OWNED, dir=parent)), None
    raise FileExistsError(errno.EEXIST, "no draft could be locked", str(parent))


def _lock(room: Path) -> int:
    """Locks a draft until the returned file descriptor is closed.

    Raises:
        BlockingIOError: Its owner is alive.
        FileNotFoundError: It was removed in the meantime.
        OSError: The file system has no locks, or the draft belongs to another user.
    """
    import fcntl

    path = room / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the locked file had just been removed by another process
        if not os.path.samestat(os.fstat(handle), path.lstat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _discard(room: Path) -> None:
    """Removes a draft after restoring what it had moved aside; keeps everything if that fails."""
    try:
        for old in (room / "old").iterdir():
            with suppress(FileExistsError):
                _move(old, room.parent / old.name)
    except FileNotFoundError:
        pass  # nothing had been moved aside
    except OSError:
        return
    shutil.rmtree(room, ignore_errors=True)


def _move(folder: Path, place: Path) -> None:
    """Moves a folder to a path that must not exist.

    Raises:
        FileExistsError: It exists.
    """
    if _renameat2(folder, place, _ONLY_IF_FREE):
        return
    try:
        if os.path.lexists(place):
            raise FileExistsError
        os.rename(folder, place)  # succeeds only onto a missing or empty folder
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EEXIST) or isinstance(error, FileExistsError):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
        raise


def _renameat2(one: Path, other: Path, how: int) -> bool:
    """Calls Linux's ``renameat2``; returns whether it is supported.

    Raises:
        OSError: The call failed.
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
    import ctypes  # imported here because most commands write nothing

    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library without it
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call


def _sync_all(made: Path) -> None:
    """Syncs a file, or a folder with all its content, to disk."""
    for folder, _, names in os.walk(made):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                sync(path)
        sync(Path(folder))
    if not made.is_dir():
        sync(made)
