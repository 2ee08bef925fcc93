"""What tests of the server share: a toy pipeline, and the page in a real Chromium."""

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest

from koala.generation import Pipeline, load
from koala.lora.names import base_named
from toy import toy_pipeline
from toy_browser import Page, serving
from toy_lora import toy_lora


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Of toy size; many modules have one of their own."""
    return load(toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala"), "cpu")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    loras = tmp_path_factory.mktemp("loras")
    toy_lora(loras / "ink.safetensors", base_named("koala-mini"))
    data = tmp_path_factory.mktemp("gallery")
    with serving(data, "--max-batch", "4", "--lora-dir", str(loras)) as url:
        yield url


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Page]:
    page = Page(downloads)
    yield page
    page.driver.quit()


@pytest.fixture
def page(browser: Page, server: str) -> Iterator[Page]:
    """The page, just opened; nothing of it may go against its own policy or fail unseen."""
    browser.open(server)
    browser.ready()
    yield browser
    assert browser.complaints() == []


@pytest.fixture(scope="session")
def signing_files(tmp_path_factory):
    """A key, and its certificate with that of the authority that signed it."""
    pytest.importorskip("c2pa")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Toys"),
                   x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("root", "server")
    ]  # fmt: skip
    start, made = datetime.datetime(2026, 1, 1), []
    for i, (key, name) in enumerate(zip(keys, names, strict=True)):
        root = i == 0
        usage = x509.KeyUsage(not root, False, False, False, False, root, root, False, False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
        builder = (
            x509.CertificateBuilder(names[0], name, key.public_key(), i + 1)
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(36500))
            .add_extension(x509.BasicConstraints(root, None), True)
            .add_extension(usage, True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(issuer, False)
        )
        if not root:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, False)
        certificate = builder.sign(keys[0], hashes.SHA256())
        made.insert(0, certificate.public_bytes(serialization.Encoding.PEM))
    folder = tmp_path_factory.mktemp("keys")
    (folder / "key.pem").write_bytes(
        keys[1].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "chain.pem").write_bytes(b"".join(made))
    return folder / "key.pem", folder / "chain.pem"
