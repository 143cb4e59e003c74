"""Signed bundles: who made them, as digests alone cannot say.

    demo/        the bundle; its five files are what is signed
    demo.sig     beside it: OpenSSF's model signature, a Sigstore bundle with an in-toto statement

It is made and checked by the package model-signing with a pair of elliptic-curve keys; `model_signing verify key` of
that package reads the same file. A signature speaks of files; what is loaded is bytes in memory. So the bundle is
loaded first, and its digest must be the one that the signed statement names.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from candor.model_store.bundle import Bundle, load_bundle
from candor.model_store.errors import BundleError, Difference
from candor.model_store.manifest import MANIFEST


class BundleUnsigned(BundleError):
    """A bundle has no signature, or none by this key."""


def signature_of(bundle: Path) -> Path:
    """Returns where a bundle's signature lies: beside its directory."""
    whole = Path(os.path.abspath(bundle))
    return whole.with_name(whole.name + ".sig")


def sign(bundle: Path, private_key: Path, password: str | None = None) -> Path:
    """Signs a bundle that is whole; returns the signature's file. private_key: in PEM format.

    Raises BundleError, or OSError where the signature cannot be written.
    """
    signing = _package("signing")
    load_bundle(bundle)
    target = signature_of(bundle)
    staged = target.with_name(target.name + ".tmp")
    try:
        signing.Config().use_elliptic_key_signer(private_key=private_key, password=password).sign(
            bundle, staged
        )
    except (ValueError, TypeError, OSError) as error:
        staged.unlink(missing_ok=True)
        raise BundleError(
            f"the bundle cannot be signed with {private_key}: {error}",
            remedy="Give an elliptic-curve key: `openssl ecparam -name prime256v1 -genkey -noout -out KEY`.",
        ) from error
    os.replace(staged, target)
    return target


def load_signed(path: Path, public_key: Path | None) -> Bundle:
    """Loads a bundle and, where a key is given, checks that it was signed with it. Raises BundleError."""
    bundle = load_bundle(path)
    if public_key is not None:
        require_signed(path, bundle.digest, public_key)
    return bundle


def require_signed(path: Path, digest: str, public_key: Path) -> None:
    """Raises BundleUnsigned unless the bundle of this digest in `path` was signed with the key.

    public_key: in PEM format.
    """
    verifying = _package("verifying")
    file = signature_of(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BundleUnsigned(
            "the bundle is not signed",
            [Difference(str(file), "a signature", str(error))],
            "Sign it with `candor bundle sign`, or serve without CANDOR_BUNDLE_KEY.",
        ) from error
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "signature")  # what is checked is what is read below
            copy.write_bytes(content)
            verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(path, copy)
        signed = _signed_digest(content)
    except Exception as error:  # the package raises errors of many kinds
        raise BundleUnsigned(
            f"the bundle in {path} has no signature by {public_key}",
            [Difference(str(file), "one by that key, of these files", str(error) or type(error).__name__)],
            "Get the bundle from whoever holds the key; do not sign one that you did not make.",
        ) from error
    if signed != digest:
        raise BundleUnsigned(
            f"the signature in {file} is another bundle's", [Difference(MANIFEST, digest, str(signed))]
        )


def _signed_digest(content: bytes) -> str | None:
    """Returns the SHA-256 of manifest.json that a signature's statement names."""
    statement = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"]))
    for one in statement["predicate"]["resources"]:
        if one["name"] == MANIFEST and one.get("algorithm", "sha256") == "sha256":
            return str(one["digest"])
    return None


def _package(module: str) -> Any:
    try:
        # It logs each file at level info, and each failure that we report.
        logging.getLogger("model_signing").setLevel(logging.ERROR)
        from importlib import import_module

        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise BundleError(
            f"signatures need the package model-signing ({error})", remedy="Install candor[signing]."
        ) from error
