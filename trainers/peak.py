"""The most GPU memory that was in use, where captured graphs compute in some of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from trainers.engine import Engine


def held_by_graphs(pool: tuple[int, int] | None = None) -> int:
    """Bytes that captured graphs compute in, of one pool or of all: free to the allocator's books, and nobody else's.

    It takes long where many blocks are allocated.
    """
    torch = sys.modules["torch"]
    return sum(
        int(segment["total_size"] - segment["allocated_size"])
        for segment in torch.cuda.memory_snapshot()
        if segment["segment_pool_id"] == pool or (pool is None and segment["segment_pool_id"] != (0, 0))
    )


def take_bytes(engines: Mapping[str, Engine], method: str) -> int | None:
    """Returns the GPU memory's high-water mark since the last call, in bytes; None where no GPU is in use.

    What engines of other methods than the one at work keep for their next trials is not in it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    kept = [engine.kept() for other, engine in engines.items() if other != method]
    in_graphs = engines[method].kept().in_graphs
    allocated = int(torch.cuda.max_memory_allocated()) - sum(it.allocated for it in kept) + in_graphs
    reserved = int(torch.cuda.max_memory_reserved()) - sum(it.allocated + it.in_graphs for it in kept)
    torch.cuda.reset_peak_memory_stats()
    return min(allocated, reserved)
