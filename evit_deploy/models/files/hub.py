"""Checkpoints on the Hugging Face hub: the local cache first, then the network."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from evit_deploy.errors import CheckpointError, InputError, MissingRequirement

PREFIX = "hf-hub:"
_PREFIXES = (PREFIX, "hf_hub:")  # timm writes it either way
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"(?P<id>{_PART}/{_PART})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,95}}))?")


class Repository(msgspec.Struct, frozen=True):
    """A repository of the hub.

    Args:
        id: ``org/name``.
        revision: Branch, tag or commit; ``None`` for the default branch.
    """

    id: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """As it is written where it could be a path too."""
        return PREFIX + self.id + (f"@{self.revision}" if self.revision else "")


def repository_of(text: str) -> Repository | None:
    """The repository that a text names; ``None`` if it names none.

    >>> repository_of("google/vit-base-patch16-224").name
    'hf-hub:google/vit-base-patch16-224'

    Raises:
        InputError: It has the prefix of a hub id, and what follows is none.
    """
    prefix = next((prefix for prefix in _PREFIXES if text.startswith(prefix)), "")
    found = _ID.fullmatch(text.removeprefix(prefix))
    if found is not None:
        return Repository(found["id"], found["revision"])
    if prefix:
        raise InputError("not a hub id", where=text, wanted=f"{PREFIX}org/name or {PREFIX}org/name@revision")
    return None


def fetch(
    repository: Repository, wanted: Callable[[Sequence[str]], list[str]], complete: Callable[[Path], bool]
) -> Path:
    """The folder of a repository in the hub's cache, fetched if it is not there.

    Args:
        repository: Which.
        wanted: Chooses the files to fetch from the names of all.
        complete: Whether a folder of the cache holds all that is needed.

    Raises:
        CheckpointError: The hub has no such repository, or it holds no weights.
        MissingRequirement: It is not in the cache, and the hub cannot be asked.
    """
    folder = cached(repository)
    if folder is not None and complete(folder):
        return folder
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    why_not = unreachable()
    if why_not:
        raise MissingRequirement(
            f"{repository.id!r} is not a local file and not in the hub's cache, and the Hugging Face hub does not "
            f"answer ({why_not})",
            fix="Check the path; or connect to the network once, or download the folder and give its path.",
        )
    try:
        names = HfApi().list_repo_files(repository.id, revision=repository.revision)
        paths = [hf_hub_download(repository.id, name, revision=repository.revision) for name in wanted(names)]
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        known = {401: "no such model, or one that needs a login", 403: "a login without access", 404: "no such model"}
        what = known.get(status or 0)
        if what is None:
            raise _failed(repository, error) from error
        fix = "Check the name; for a private or gated model log in with `hf auth login`."
        raise CheckpointError(f"the Hugging Face hub answered: {what}", where=repository.name, fix=fix) from None
    except CheckpointError:
        raise
    except Exception as error:  # of whichever HTTP library the hub uses, and of the disk
        raise _failed(repository, error) from error
    return Path(paths[0]).parent


def cached(repository: Repository) -> Path | None:
    """The repository's folder in the hub's cache; ``None`` if it was never fetched. Asks no network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository.id, revision=repository.revision, local_files_only=True))
    except Exception:  # its kind differs between versions of the hub's library
        return None


def unreachable() -> str:
    """Why the hub cannot be asked; empty when it can. One short question instead of the hub's minute of retries."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of whichever HTTP library the hub uses
        return type(error).__name__
    return ""


def _failed(repository: Repository, error: Exception) -> MissingRequirement:
    return MissingRequirement(
        f"{repository.id!r} could not be fetched from the Hugging Face hub ({type(error).__name__})",
        fix="Try again, or download the folder and give its path.",
    )
