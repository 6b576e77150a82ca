"""Certificates for tests of TLS and mutual TLS, made with the `openssl` program (1.1.1 or later)."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_VALID = ("20200101000000Z", "20991231235959Z")
_EXPIRED = ("20200101000000Z", "20210101000000Z")

_CONFIGURATION = """\
[req]
distinguished_name = name
prompt = no
[name]
[ca]
default_ca = authority
[authority]
database = index.txt
serial = serial
new_certs_dir = .
default_md = sha256
policy = policy
unique_subject = no
copy_extensions = none
[policy]
commonName = supplied
[authority_extensions]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = @hosts
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[hosts]
DNS.1 = localhost
IP.1 = 127.0.0.1
IP.2 = ::1
"""


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority's certificate, and what it signed. Keys are EC P-256, without a passphrase."""

    ca: Path
    server_certificate: Path
    server_key: Path
    client_certificate: Path
    client_key: Path


def make_certificates(
    directory: Path, *, server_expired: bool = False, client_expired: bool = False, name: str = "test"
) -> Certificates:
    """Make an authority, a server certificate (localhost, 127.0.0.1, ::1) and a client certificate in a directory.

    Every call makes an authority of its own, called "<name> authority"; files of an earlier call in the same directory
    are replaced. Valid from 2020 to 2099; the expired ones ended with 2020. Raises subprocess.CalledProcessError with
    openssl's words in it, FileNotFoundError without `openssl`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "openssl.cnf").write_text(_CONFIGURATION, encoding="utf-8")
    (directory / "index.txt").write_text("", encoding="utf-8")
    (directory / "serial").write_text("01\n", encoding="utf-8")
    _request(directory, "ca", f"{name} authority")
    _sign(directory, "ca", "authority_extensions", _VALID, "-selfsign")
    for who, expired in (("server", server_expired), ("client", client_expired)):
        _request(directory, who, f"{name} {who}")
        _sign(directory, who, who, _EXPIRED if expired else _VALID, "-cert", "ca.pem")
    return Certificates(
        ca=directory / "ca.pem",
        server_certificate=directory / "server.pem",
        server_key=directory / "server.key",
        client_certificate=directory / "client.pem",
        client_key=directory / "client.key",
    )


def _request(directory: Path, who: str, common_name: str) -> None:
    # fmt: off
    _openssl(
        directory, "req", "-new", "-config", "openssl.cnf", "-subj", f"/CN={common_name}",
        "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-keyout", f"{who}.key", "-out", f"{who}.csr",
    )
    # fmt: on


def _sign(directory: Path, who: str, extensions: str, validity: tuple[str, str], *signer: str) -> None:
    # fmt: off
    _openssl(
        directory, "ca", "-batch", "-notext", "-config", "openssl.cnf", "-extensions", extensions,
        "-startdate", validity[0], "-enddate", validity[1], "-keyfile", "ca.key", *signer,
        "-in", f"{who}.csr", "-out", f"{who}.pem",
    )
    # fmt: on


def _openssl(directory: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise subprocess.CalledProcessError(
            done.returncode, " ".join(["openssl", *arguments]) + "\n" + done.stderr, done.stdout, done.stderr
        )
