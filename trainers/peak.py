"""The most GPU memory that was in use, where captured graphs compute in some of it."""

from __future__ import annotations

import sys


def held_by_graphs() -> int:
    """Bytes that captured graphs compute in: free to the allocator's books, and nobody else's."""
    torch = sys.modules["torch"]
    return sum(
        int(segment["total_size"] - segment["allocated_size"])
        for segment in torch.cuda.memory_snapshot()
        if segment["segment_pool_id"] != (0, 0)
    )


def take_bytes() -> int | None:
    """Returns the GPU memory's high-water mark since the last call, in bytes; None where no GPU is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    most = min(int(torch.cuda.max_memory_allocated()) + held_by_graphs(), int(torch.cuda.max_memory_reserved()))
    torch.cuda.reset_peak_memory_stats()
    return most
