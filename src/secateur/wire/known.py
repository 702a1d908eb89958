"""Known tensors: a group of tensors that a message names by its digest, in 16 bytes in place of their values.

A receiver that has made or kept the group reads on; one that lacks it says so (``codec.lost``), and is sent the same
message with the group in it. ``carried.py`` says how a group is written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from secateur.wire.message import Tensors
from secateur.wire.reader import Reader, varint

_DIGEST = 16


@dataclass(frozen=True)
class Known:
    """A group of tensors in a message.

    Attributes:
        digest: what ``digest`` says of the group.
        carried: the group itself, see ``carried.write``; empty: it is named only.
    """

    digest: str
    carried: bytes | memoryview = b""

    def write(self) -> bytes:
        """Return the section: the digest, the length of what is carried (a varint), what is carried."""
        return b"".join([bytes.fromhex(self.digest), varint(len(self.carried)), self.carried])

    @property
    def size(self) -> int:
        """Return how many bytes the section has."""
        return _DIGEST + len(varint(len(self.carried))) + len(self.carried)

    @classmethod
    def read(cls, reader: Reader) -> Known:
        """Return what ``write`` wrote; what is carried is not copied.

        Raises:
            WireError: the section ends too early.
        """
        name = reader.take(_DIGEST, "the digest of known tensors").hex()
        return cls(name, reader.take(reader.varint("the known tensors"), "the known tensors"))


def digest(tensors: Tensors) -> str:
    """Return 32 hexadecimal digits that name these tensors: names, shapes, dtypes and bits; empty of none."""
    if not tensors:
        return ""
    running = hashlib.blake2b(digest_size=_DIGEST)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        running.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        running.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return running.hexdigest()
