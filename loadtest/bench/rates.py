"""What a device can do at best, measured: operations of a large matrix product, bytes read, bytes copied from the host.

The limit of a piece of work is the longer of its operations over the one and its bytes over the other.
"""

from dataclasses import dataclass

import torch

from loadtest.bench.harness import take_turns

PRODUCT_SIDE = {"cpu": 4096, "cuda": 8192}
READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Operations per second, and bytes read per second."""

    flops: float
    bytes_read: float

    def limit(self, operations: float, num_bytes: float) -> float:
        """The least seconds that work of so many operations on so many bytes takes."""
        return max(operations / self.flops, num_bytes / self.bytes_read)

    def best(self, other: "Rates") -> "Rates":
        """The better of two measurements of each: noise only ever slows."""
        return Rates(max(self.flops, other.flops), max(self.bytes_read, other.bytes_read))


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of several runs."""
    side = PRODUCT_SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    much = torch.ones(READ_BYTES[device.type] // 4, device=device)
    runs = {"product": lambda: a @ b, "read": lambda: much.sum()}
    seconds = take_turns(runs, REPEATS, device)
    return Rates(2 * side**3 / seconds["product"].low, READ_BYTES[device.type] / seconds["read"].low)
