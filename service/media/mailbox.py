"""One block of shared memory between a pool and one worker: each side in turn puts an object in, the other takes it out.

The block has no name and ends with the processes that hold it, so nothing is left behind however they end. It is read
and written, never mapped: a worker that misbehaves cannot pull memory from under the pool.
"""

import os
import pickle
import tempfile
from typing import Any

Sizes = tuple[int, ...]


class Mailbox:
    """Holds one object at a time. Arrays travel as they are, outside the pickle: one copy in, one copy out."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls) -> "Mailbox":
        """A new, empty block."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("media-mailbox"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def put(self, item: Any) -> Sizes:
        """Store `item`; the sizes (bytes) returned are what `take` on the other side needs."""
        arrays: list[pickle.PickleBuffer] = []
        head = pickle.dumps(item, protocol=5, buffer_callback=arrays.append)
        parts = [memoryview(head), *(array.raw() for array in arrays)]
        offset = 0
        for part in parts:
            offset = self._write(part, offset)
        return tuple(part.nbytes for part in parts)

    def take(self, sizes: Sizes) -> Any:
        """The stored item; the block is empty afterwards."""
        parts: list[bytearray] = []
        offset = 0
        for size in sizes:
            parts.append(self._read(size, offset))
            offset += size
        os.ftruncate(self.fd, 0)
        return pickle.loads(parts[0], buffers=parts[1:])

    def close(self) -> None:
        """Give up this side's hold on the block."""
        os.close(self.fd)

    def _write(self, part: memoryview, offset: int) -> int:
        while part:
            written = os.pwrite(self.fd, part, offset)
            part, offset = part[written:], offset + written
        return offset

    def _read(self, size: int, offset: int) -> bytearray:
        part = bytearray(size)
        rest = memoryview(part)
        while rest:
            num_read = os.preadv(self.fd, [rest], offset)
            if num_read == 0:
                raise EOFError("the mailbox holds less than was announced")
            rest, offset = rest[num_read:], offset + num_read
        return part
