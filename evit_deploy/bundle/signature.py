"""A signature over a bundle's manifest, which lists the hash of every other file.

``manifest.sig`` is the 64-byte Ed25519 signature of ``manifest.json``, which other tools can verify too::

    openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in manifest.json -sigfile manifest.sig

Keys are files in OpenSSL's (PEM) or OpenSSH's format.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.bundle.manifest import MANIFEST, SIGNATURE
from evit_deploy.documents import Limits, read_bytes
from evit_deploy.environment.requirements import require_extra
from evit_deploy.errors import GateFailed, InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_KEY = Limits(size=1 << 16)
_MAKE = "Make one: openssl genpkey -algorithm ed25519 -out key.pem"


def read_private_key(path: Path) -> "Ed25519PrivateKey":
    """Reads a private key for signing.

    Args:
        path: PEM or OpenSSH file, without a passphrase.

    Raises:
        InputError: The file cannot be read, or does not contain an unencrypted Ed25519 key.
        MissingRequirement: The ``cryptography`` package is missing.
    """
    require_extra("sign")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    content = read_bytes(path, _KEY)
    ssh = b"OPENSSH PRIVATE KEY" in content[:100]
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    try:
        key = load(content, password=None)
    except TypeError:
        raise InputError(
            "the key is encrypted", where=path, fix="Give one without a passphrase, in a file that only you can read."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError("not a private key", where=path, wanted="Ed25519 in PEM or OpenSSH", fix=_MAKE) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("the key has the wrong type", where=path, seen=type(key).__name__, wanted="Ed25519", fix=_MAKE)
    return key


def read_public_key(path: Path) -> "Ed25519PublicKey":
    """Reads a public key for checking signatures.

    Args:
        path: PEM or OpenSSH file.

    Raises:
        InputError: The file cannot be read or does not contain an Ed25519 key.
        MissingRequirement: The ``cryptography`` package is missing.
    """
    require_extra("sign")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    content = read_bytes(path, _KEY)
    load = serialization.load_ssh_public_key if content.startswith(b"ssh-") else serialization.load_pem_public_key
    try:
        key = load(content)
    except (ValueError, UnsupportedAlgorithm):
        secret = b"PRIVATE KEY" in content[:100]
        raise InputError(
            "this is a private key" if secret else "not a public key", where=path, wanted="Ed25519 in PEM or OpenSSH",
            fix="Write its public half: openssl pkey -in key.pem -pubout -out public.pem",
        ) from None  # fmt: skip
    if not isinstance(key, Ed25519PublicKey):
        raise InputError("the key has the wrong type", where=path, seen=type(key).__name__, wanted="Ed25519")
    return key


def sign(folder: Path, key: "Ed25519PrivateKey") -> None:
    """Signs the manifest of a finished bundle."""
    (folder / SIGNATURE).write_bytes(key.sign((folder / MANIFEST).read_bytes()))


def read_signed(path: str | Path, key: Path) -> Bundle:
    """Reads a bundle after checking its signature.

    Args:
        path: Its folder.
        key: Public key; see :func:`read_public_key`.

    Raises:
        GateFailed: The bundle is not signed, is signed with another key, or was changed since.
        InputError: See :func:`read_public_key` and :func:`~evit_deploy.bundle.bundle.read_bundle`.
        MissingRequirement: See :func:`read_public_key`.
    """
    public, bundle = read_public_key(key), read_bundle(path)
    from cryptography.exceptions import InvalidSignature

    if not (bundle.path / SIGNATURE).is_file():
        raise GateFailed("the bundle is not signed", where=bundle.path, seen=f"no {SIGNATURE}")
    signature, content = read_bytes(bundle.path / SIGNATURE, _KEY), read_bytes(bundle.path / MANIFEST)
    try:
        public.verify(signature, content)
    except InvalidSignature:
        raise GateFailed(
            "the manifest was changed after it was signed, or signed with another key", where=bundle.path / SIGNATURE
        ) from None
    if read_bundle(path).manifest != bundle.manifest:
        raise GateFailed("the bundle was replaced while it was read", where=bundle.path)
    return bundle
