"""Keys: a node's client number belongs to the key that first took part under it, for the whole run.

A node with a folder ``state`` has an Ed25519 key in it for its client number, made when it is first greeted. It signs
the server's challenge together with the number of its node, so that no signature is of use for another node or a second
time. The server notes the key of each client in the run's folder. A node without ``state`` has no key; its number is
its own for as long as it is connected.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from secateur.errors import CheckpointError
from secateur.federation import checkpoint
from secateur.flower.greeting import Greeting

NAME, KEYS = "key", "nodes.json"
"""The file of a node's key in its folder ``state``, before the client's number; that of a run's keys in its folder."""

_SIZE = 32


def challenge() -> str:
    """Return what a node is to sign."""
    return secrets.token_hex(16)


def proof(state: Path, asked: str, node: int, client: int) -> dict[str, str]:
    """Return a node's public key and its signature of a challenge, in hexadecimal digits.

    Raises:
        CheckpointError: the key cannot be read or written.
    """
    key = Ed25519PrivateKey.from_private_bytes(_secret(state / f"{NAME}-{client}"))
    signed = key.sign(_text(asked, node, client))
    return {"key": key.public_key().public_bytes_raw().hex(), "proof": signed.hex()}


def _secret(path: Path) -> bytes:
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"making-{secrets.token_hex(8)}")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_SIZE))
            try:
                os.link(fresh, path)  # whichever process is first makes the key
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        secret = path.read_bytes()
    except OSError as broken:
        raise CheckpointError(f"cannot keep this node's key in {path}: {broken.strerror or broken}") from broken
    if len(secret) != _SIZE:
        raise CheckpointError(f"{path} is no key of {_SIZE} bytes: bring it back, or delete it for a new one")
    return secret


def _text(asked: str, node: int, client: int) -> bytes:
    return f"secateur greeting {asked} of node {node} for client {client}".encode()


def proven(greeting: Greeting, asked: str, node: int) -> bool:
    """Return whether a node has shown that its greeting's key is its own; without a key there is nothing to show."""
    if not greeting.key and not greeting.proof:
        return True
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(greeting.key))
        key.verify(bytes.fromhex(greeting.proof), _text(asked, node, greeting.client))
    except (ValueError, InvalidSignature):
        return False
    return True


class Owners:
    """The keys of a run's clients, which are kept in its folder.

    Args:
        path: of the file; None: they are kept in memory only.

    Raises:
        CheckpointError: the file cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._keys: dict[int, str] = {}
        if path is not None and path.exists():
            try:
                self._keys = {int(client): str(key) for client, key in json.loads(path.read_text("utf-8")).items()}
            except (OSError, ValueError, AttributeError) as broken:
                raise CheckpointError(
                    f"{path} cannot be read ({broken}): bring it back, or delete it to bind keys anew"
                ) from broken

    def wrong(self, greeting: Greeting) -> str | None:
        """Return why a number is not that of a node; None: it may have it."""
        owner = self._keys.get(greeting.client)
        if owner is not None and owner != greeting.key:
            return (
                f"client {greeting.client} belongs to another node's key: give this node the state folder that the "
                f"client had, or another partition-id; or delete the client's line in the run's {KEYS}"
            )
        earlier = next((who for who, key in self._keys.items() if greeting.key and key == greeting.key), None)
        if earlier is not None and earlier != greeting.client:
            return f"its key is that of client {earlier}, and it says it is client {greeting.client} (partition-id)"
        return None

    def bind(self, client: int, key: str) -> None:
        """Note a client's key.

        Raises:
            CheckpointError: it cannot be written.
        """
        if key and self._keys.get(client) != key:
            self._keys[client] = key
            if self._path is not None:
                checkpoint.write(self._path, (json.dumps(self._keys, indent=1) + "\n").encode())
