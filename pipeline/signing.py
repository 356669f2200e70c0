"""Signatures: an Ed25519 key says who wrote a manifest, and the manifest has a hash of everything else."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from onnxsmith.errors import BadInputError, ModelFileError, require
from onnxsmith.package_io import MANIFEST_NAME

__all__ = ["SIGNATURE_NAME", "check_signature", "sign_artifact"]

SIGNATURE_NAME = "manifest.sig"
_MAKE_A_KEY = "Make one with `openssl genpkey -algorithm ed25519 -out key.pem`"


def sign_artifact(directory: Path, key_file: Path) -> str:
    """Signs the manifest of an artifact; the signature goes to ``manifest.sig``.

    Args:
        directory: The artifact.
        key_file: An Ed25519 private key in PEM, without a password (RFC 8032, RFC 8410).

    Returns:
        The fingerprint of the public key: SHA-256 of its 32 bytes, in hex.

    Raises:
        BadInputError: The key cannot be read, or is of another kind.
        MissingDependencyError: cryptography is not installed.
    """
    key = _load(key_file, private=True)
    public = key.public_key()
    document = {
        "schema_version": 1,
        "algorithm": "ed25519",
        "signed": MANIFEST_NAME,
        "public_key": base64.b64encode(public.public_bytes_raw()).decode(),
        "signature": base64.b64encode(key.sign((directory / MANIFEST_NAME).read_bytes())).decode(),
    }
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    (directory / SIGNATURE_NAME).write_text(text, encoding="utf-8")
    return _fingerprint(public)


def check_signature(directory: Path, key_file: Path | None = None) -> tuple[str | None, str | None]:
    """Checks the signature of an artifact.

    Args:
        directory: The artifact.
        key_file: The public key, in PEM, that must have signed it. Without, any key may have: what is found
            is then only that whoever signed it has not been contradicted.

    Returns:
        The fingerprint of the key that signed, None where there is no signature or it is wrong; and what is
        wrong, None where nothing is.

    Raises:
        BadInputError: The key cannot be read.
        ModelFileError: The signature file is no such thing.
    """
    path = directory / SIGNATURE_NAME
    expected = _load(key_file, private=False) if key_file is not None else None
    if not path.is_file() or path.is_symlink():
        return None, "there is no signature; expected one by the given key" if expected else None
    crypto = require("cryptography.hazmat.primitives.asymmetric.ed25519", purpose="checking a signature")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["algorithm"] != "ed25519" or document["signed"] != MANIFEST_NAME:
            raise ValueError("it is of another kind")
        public = crypto.Ed25519PublicKey.from_public_bytes(base64.b64decode(document["public_key"]))
        signature = base64.b64decode(document["signature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(str(path), got=f"cannot be read: {error}", expected="a signature") from error
    if expected is not None and expected.public_bytes_raw() != public.public_bytes_raw():
        return None, f"signed by {_fingerprint(public)}; expected {_fingerprint(expected)}"
    try:
        public.verify(signature, (directory / MANIFEST_NAME).read_bytes())
    except require("cryptography.exceptions", purpose="checking a signature").InvalidSignature:
        return None, "the signature is not of this manifest"
    return _fingerprint(public), None


def _load(path: Path, *, private: bool) -> Any:
    crypto = require("cryptography.hazmat.primitives.asymmetric.ed25519", purpose="a signature")
    serialization = require("cryptography.hazmat.primitives.serialization", purpose="a signature")
    kind = "private" if private else "public"
    try:
        content = path.read_bytes()
        key = (
            serialization.load_pem_private_key(content, password=None)
            if private
            else serialization.load_pem_public_key(content)
        )
    except OSError as error:
        raise BadInputError(
            f"key {path}", got=f"cannot be read: {error.strerror}", expected=f"an Ed25519 {kind} key in PEM"
        ) from error
    except (
        ValueError,
        TypeError,
        require("cryptography.exceptions", purpose="a signature").UnsupportedAlgorithm,
    ) as e:
        raise BadInputError(
            f"key {path}",
            got=str(e).partition(".")[0] or "no key",
            expected=f"an Ed25519 {kind} key in PEM, without a password",
            remedy=_MAKE_A_KEY if private else "Get it with `openssl pkey -in key.pem -pubout`",
        ) from e
    wanted = crypto.Ed25519PrivateKey if private else crypto.Ed25519PublicKey
    if not isinstance(key, wanted):
        raise BadInputError(
            f"key {path}", got=type(key).__name__, expected=f"an Ed25519 {kind} key", remedy=_MAKE_A_KEY
        )
    return key


def _fingerprint(public: Any) -> str:
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()
