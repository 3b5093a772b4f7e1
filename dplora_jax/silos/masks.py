"""Masks that cancel in the sum over all peers and hide each summand (Bonawitz et al. 2017, section 4, without its recovery: a
sum that lacks one peer stays hidden for ever, from everybody).

Every pair of sites shares an X25519 secret (RFC 7748). Of it HKDF-SHA256 (RFC 5869) makes a key for one request of one plan, and
ChaCha20 (RFC 8439) under that key makes D words of 32 bits, which the one site adds and the other subtracts, modulo 2^32. The
request's digest binds a mask to its round, attempt, peers, adapter and the start of each site's process: no other request
has the same.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def mask(own_key, number, peer_keys, plan, request, count):
    """The mask of site `number` for the request of this digest: uint32 [count]. `own_key` is its X25519PrivateKey, and
    `peer_keys` are {number: X25519PublicKey} of all other peers. Over all peers, masks sum to 0 modulo 2^32."""
    total = np.zeros(count, np.uint32)
    for peer, key in peer_keys.items():
        words = _words(own_key.exchange(key), plan, request, count)
        total = total + words if number < peer else total - words
    return total


def _words(shared, plan, request, count):
    info = b"dplora_jax mask" + request
    key = HKDF(SHA256(), 32, salt=plan, info=info).derive(shared)
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()  # the key is of one use: any nonce does
    return np.frombuffer(stream.update(bytes(4 * count)), "<u4")


def hide(integers, words):
    """int32 [D] under a mask, modulo 2^32: uint32 [D]."""
    return integers.astype(np.int32).view(np.uint32) + words


def total(hidden):
    """The sum of what all peers sent (uint32 [D] each), as int32 [D]: that of their integers, where it lies within 31 bits and no
    peer is missing."""
    return np.sum(np.stack(hidden), axis=0, dtype=np.uint32).view(np.int32)
