"""`--sign-key`: each picture carries a C2PA manifest, signed with a key of one's own.

It says that a model made the picture (https://c2pa.org), and any change to the file shows. The
package c2pa-python writes it; nothing is asked of any other server, so there is no time stamp.
"""

import io
import json
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from koala import __version__
from koala.errors import UserError

MANIFEST = {
    "claim_generator_info": [{"name": "koala", "version": __version__}],
    "assertions": [
        {
            "label": "c2pa.actions",
            "data": {
                "actions": [
                    {
                        "action": "c2pa.created",
                        "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/"
                        "trainedAlgorithmicMedia",
                    }
                ]
            },
        }
    ],
}

SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}  # larger than most of our images


class Signing:
    """Signs pictures. Thread-safe.

    key: a private key as PEM without a password. certificates: its certificate as PEM, then those
    that it was signed with. UserError if they cannot sign.
    """

    def __init__(self, key: Path, certificates: Path) -> None:
        import c2pa

        private, chain = _read(key, "--sign-key"), _read(certificates, "--sign-certificates")
        self._lock = threading.Lock()
        self._context = c2pa.Context.from_dict(SETTINGS)
        try:
            info = c2pa.C2paSignerInfo(_algorithm(private, key), chain, private, None)
            self._signer = c2pa.Signer.from_info(info)
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, "PNG")
            self(file.getvalue(), "png")
        except c2pa.C2paError as error:
            raise UserError(
                f"{key} and {certificates} cannot sign: {' '.join(str(error).split())}; give a key "
                "as PEM, and its certificate with those that it was signed with"
            ) from None

    def __call__(self, data: bytes, format: str) -> bytes:
        """A file (png, jpeg or webp) with its manifest."""
        import c2pa

        signed = io.BytesIO()
        with self._lock:
            c2pa.Builder(json.dumps(MANIFEST), self._context).sign(
                self._signer, f"image/{format}", io.BytesIO(data), signed
            )
        return signed.getvalue()


def _read(file: Path, option: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{option} {file} cannot be read: {error.strerror}") from None


def _algorithm(private: bytes, file: Path) -> str:
    """C2PA's name of what a key signs with."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key: Any = load_pem_private_key(private, None)
    except (ValueError, TypeError):
        raise UserError(f"--sign-key {file} is no private key as PEM without a password") from None
    match key:
        case ec.EllipticCurvePrivateKey():
            sizes = {256: "es256", 384: "es384", 521: "es512"}
            return sizes.get(key.curve.key_size, "es256")
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
        case rsa.RSAPrivateKey():
            return "ps256"
    raise UserError(f"--sign-key {file}: allowed are elliptic curves, Ed25519 and RSA")
