"""Checkpoints on the Hugging Face hub: the local cache first, then the network."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from evit_deploy.errors import CheckpointError, InputError, MissingRequirement

PREFIX = "hf-hub:"
_PREFIXES = (PREFIX, "hf_hub:")  # timm uses both spellings
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
        """The repository with the prefix that distinguishes it from a path."""
        return PREFIX + self.id + (f"@{self.revision}" if self.revision else "")


def repository_of(text: str) -> Repository | None:
    """Parses a hub id; ``None`` if the text is not one.

    >>> repository_of("google/vit-base-patch16-224").name
    'hf-hub:google/vit-base-patch16-224'

    Raises:
        InputError: It has the prefix of a hub id, but is not valid.
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
    """The folder of a repository in the hub's cache; downloads it if necessary.

    Args:
        repository: The repository.
        wanted: Selects the files to fetch from all file names.
        complete: Whether a cached folder contains everything needed.

    Raises:
        CheckpointError: The hub has no such repository, or it holds no weights.
        MissingRequirement: It is not in the cache, and the hub cannot be reached.
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
    except Exception as error:  # depends on the hub's HTTP library; also disk errors
        raise _failed(repository, error) from error
    return Path(paths[0]).parent


def cached(repository: Repository) -> Path | None:
    """The repository's folder in the hub's cache; ``None`` if it is not cached. Does not use the network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository.id, revision=repository.revision, local_files_only=True))
    except Exception:  # its class depends on the version of the hub's library
        return None


def unreachable() -> str:
    """Why the hub cannot be reached; empty if it can. One short request, to avoid the hub's minute of retries."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # depends on the hub's HTTP library
        return type(error).__name__
    return ""


def _failed(repository: Repository, error: Exception) -> MissingRequirement:
    return MissingRequirement(
        f"{repository.id!r} could not be fetched from the Hugging Face hub ({type(error).__name__})",
        fix="Try again, or download the folder and give its path.",
    )
