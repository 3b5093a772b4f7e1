"""A party's keys: Ed25519 to sign, X25519 to agree on masks, and a certificate for its engine's TLS, whose key is the relay's.

`private/keys.json` (0600) never leaves the party, and its relay cannot read it. `card.json` is public: it goes into the plan.
"""

import datetime
import os
import pathlib
import re
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from dplora_jax import json_files, private_files
from dplora_jax.errors import InputError
from dplora_jax.files import to_json
from dplora_jax.privacy.chain import replace_durably

FILE, CARD, TLS_KEY, CERTIFICATE = "keys.json", "card.json", "tls_key.pem", "certificate.pem"
YEARS = 10
NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
KEY = json_files.hexadecimal(64, 64)
CARD_FIELDS = {
    "name": json_files.text(64), "records": json_files.whole(0, 10**9), "ed25519": KEY, "x25519": KEY,
    "certificate": json_files.text(4096),
}  # fmt: skip
CARD_SCHEMA = json_files.record(CARD_FIELDS)


class Keys(NamedTuple):
    """The private keys: `sign` for messages and approvals, `agree` for masks."""

    sign: Ed25519PrivateKey
    agree: X25519PrivateKey


def create(folder, name, records):
    """Make a party's keys in `folder` and its public card -> the card (a dict). `records` is how many it has, a public
    number; 0 of a coordinator. The relay's TLS key and certificate lie in `folder`/relay. Raises InputError where there are
    keys already."""
    folder = pathlib.Path(folder)
    private, relay = folder / "private", folder / "relay"
    if (private / FILE).exists():
        raise InputError(
            f"{private / FILE} exists: the plan that a party signed names these keys, so they are not replaced."
        )
    if not NAME.fullmatch(name):
        raise InputError(f"name={name} must be letters, digits and underscores: it names files and certificates.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    private.mkdir(mode=0o700, exist_ok=True)
    relay.mkdir(mode=0o700, exist_ok=True)
    sign, agree = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
    tls = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(name, tls).public_bytes(serialization.Encoding.PEM).decode()
    pem = tls.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    replace_durably(relay / TLS_KEY, pem, 0o600)
    replace_durably(relay / CERTIFICATE, certificate)
    card = {
        "name": name, "records": records, "ed25519": public(sign).hex(), "x25519": public(agree).hex(),
        "certificate": certificate,
    }  # fmt: skip
    replace_durably(folder / CARD, to_json(card, indent=1) + "\n")
    keys = {"ed25519": _raw(sign).hex(), "x25519": _raw(agree).hex()}
    private_files.write(private / FILE, keys)  # last: with it the party has its keys
    return card


def load(folder):
    """The Keys in `folder`; InputError where there are none."""
    path = pathlib.Path(folder) / "private" / FILE
    try:
        held = json_files.load(path, json_files.record({"ed25519": KEY, "x25519": KEY}))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: make this party's keys first.") from None
    except json_files.Unfit as error:
        raise InputError(f"{path} is damaged: {error}; restore it.") from None
    raw = {name: bytes.fromhex(held[name]) for name in ("ed25519", "x25519")}
    return Keys(
        Ed25519PrivateKey.from_private_bytes(raw["ed25519"]), X25519PrivateKey.from_private_bytes(raw["x25519"])
    )


def read_card(path):
    """The card (a dict) in a file that another party sent; InputError."""
    try:
        card = json_files.load(pathlib.Path(path), CARD_SCHEMA)
        check_card(card)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the card.json of a party.") from None
    except json_files.Unfit as error:
        raise InputError(f"{path} is no party's card: {error}.") from None
    return card


def check_card(card):
    """Raise Unfit where a card's name is no name or its keys are no keys."""
    if not NAME.fullmatch(card["name"]):
        raise json_files.Unfit("its name is not letters, digits and underscores")
    try:
        verifier(card["ed25519"]), fingerprint(card["certificate"])
        # A point of low order would give everyone the same masks.
        X25519PrivateKey.generate().exchange(agreement(card["x25519"]))
    except ValueError:
        raise json_files.Unfit("its keys or its certificate are none") from None


def public(key):
    """The 32 bytes of a private key's public key."""
    return key.public_key().public_bytes_raw()


def verifier(text):
    """The Ed25519PublicKey that a card names in hex."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))


def agreement(text):
    """The X25519PublicKey that a card names in hex."""
    return X25519PublicKey.from_public_bytes(bytes.fromhex(text))


def fingerprint(certificate):
    """SHA-256 of a certificate (PEM): what a TLS peer is known by."""
    return x509.load_pem_x509_certificate(certificate.encode()).fingerprint(hashes.SHA256())


def _raw(key):
    return key.private_bytes_raw()


def _certificate(name, key):
    """A certificate that the party signs itself: both sides know it from the plan, and trust no authority."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), int.from_bytes(os.urandom(16), "big") >> 1)
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=365 * YEARS))
    return builder.sign(key, hashes.SHA256())
