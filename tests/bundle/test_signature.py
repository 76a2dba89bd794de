"""Signatures: written by convert, checked by verify and by other tools, broken by any change."""

import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from evit_deploy.bundle.bundle import Bundle, check_out, read_bundle, write_manifest
from evit_deploy.bundle.manifest import MANIFEST, SIGNATURE
from evit_deploy.bundle.signature import read_private_key, read_public_key, read_signed, sign
from evit_deploy.errors import GateFailed, InputError

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def write_keys(folder: Path, *, ssh: bool = False) -> tuple[Path, Path]:
    """A private and a public key as files."""
    key = Ed25519PrivateKey.generate()
    form = PrivateFormat.OpenSSH if ssh else PrivateFormat.PKCS8
    public = (Encoding.OpenSSH, PublicFormat.OpenSSH) if ssh else (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    folder.mkdir(exist_ok=True)
    (folder / "key").write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
    (folder / "public").write_bytes(key.public_key().public_bytes(*public))
    return folder / "key", folder / "public"


@pytest.fixture
def bundle(tmp_path: Path, converted: Bundle) -> Bundle:
    shutil.copytree(converted.path, tmp_path / "bundle")
    return read_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("ssh", [False, True])
def test_what_was_signed_is_read(bundle, tmp_path, ssh):
    private, public = write_keys(tmp_path / "keys", ssh=ssh)
    sign(bundle.path, read_private_key(private))
    assert read_signed(bundle.path, public) == bundle
    check_out(bundle.path, force=True)  # the signature is the bundle's own file


def test_other_tools_check_the_signature_too(bundle, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    private, public = write_keys(tmp_path / "keys")
    sign(bundle.path, read_private_key(private))
    asked = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", MANIFEST]
    subprocess.run([*asked, "-sigfile", SIGNATURE], cwd=bundle.path, check=True, capture_output=True)


def test_any_change_breaks_it(bundle, tmp_path):
    private, public = write_keys(tmp_path / "keys")
    _, other = write_keys(tmp_path / "others")
    with pytest.raises(GateFailed, match="not signed"):
        read_signed(bundle.path, public)
    sign(bundle.path, read_private_key(private))
    with pytest.raises(GateFailed, match="another key"):
        read_signed(bundle.path, other)
    content = (bundle.path / SIGNATURE).read_bytes()
    for broken in (b"", content[:-1], content + b"\n", bytes(64)):
        (bundle.path / SIGNATURE).write_bytes(broken)
        with pytest.raises(GateFailed, match="changed after it was signed"):
            read_signed(bundle.path, public)
    (bundle.path / SIGNATURE).write_bytes(content)
    read_signed(bundle.path, public)
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, notes=["another"]))
    assert SIGNATURE not in read_bundle(bundle.path).manifest.files
    with pytest.raises(GateFailed, match="changed after it was signed"):
        read_signed(bundle.path, public)


def test_keys_of_other_kinds_are_refused(tmp_path):
    private, public = write_keys(tmp_path / "keys")
    with pytest.raises(InputError, match=r"this is a private key.*openssl pkey"):
        read_public_key(private)
    with pytest.raises(InputError, match="not a private key"):
        read_private_key(public)
    with pytest.raises(InputError, match="no such file"):
        read_private_key(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a public key"):
        read_public_key(tmp_path / "text")
    encrypted = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    (tmp_path / "encrypted").write_bytes(encrypted)
    with pytest.raises(InputError, match="the key is encrypted"):
        read_private_key(tmp_path / "encrypted")
    curve = generate_private_key(SECP256R1())
    (tmp_path / "curve").write_bytes(curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InputError, match="the key has the wrong type"):
        read_private_key(tmp_path / "curve")
    form = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "curve.pub").write_bytes(curve.public_key().public_bytes(*form))
    with pytest.raises(InputError, match="the key has the wrong type"):
        read_public_key(tmp_path / "curve.pub")


def test_convert_signs_and_verify_trusts(cli, tmp_path, checkpoint_file):
    private, public = write_keys(tmp_path / "keys")
    _, other = write_keys(tmp_path / "others")
    out = tmp_path / "out"
    cli("convert", checkpoint_file, "--keep-rate", "0.6", "--out", out, "--sign", tmp_path / "none").refused(2, "none")
    assert not out.exists()
    made = cli("convert", checkpoint_file, "--keep-rate", "0.6", "--out", out, "--sign", private)
    assert made.code == 0, made.err
    result = cli("verify", out, "--trust", public, "--runtime", "onnxruntime")
    assert result.code == 0, result.err
    assert f"signed with {public}" in result.out
    cli("verify", out, "--trust", other, "--runtime", "onnxruntime").refused(1, "another key")
