"""Runs streams on a CUDA device: fixed shapes, compiled layers, and graphs where launching costs more than computing.

A stream is padded to one of a few lengths, so nothing is compiled or captured again when trials come and go: what
changes from one micro-step to the next is the content of buffers. The host lays out the next stream while the device
works on this one, and nothing between two optimizer steps waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainers.engine import Kept, Warm
from trainers.lora import (
    adamw_kernels,
    attention_kernels,  # noqa: F401  (registers the operator that attention.py calls)
)
from trainers.lora.attention import packed as packed_attention
from trainers.lora.bank import Slot, stream_rank
from trainers.lora.head import Targets, chunk_of
from trainers.lora.linear import PackedGroup
from trainers.lora.stream import BLOCK, TILE, WIDE, Laid, Part, Stream, blocks_of, lay, slot_row, tiles_of
from trainers.models import Base, layers_of
from trainers.peak import held_by_graphs
from trainers.splits import Split

SHORTEST = 512  # tokens of the shortest stream
EXAMPLES_STEP = 128  # of room for examples in a stream
ALIGNED = 4  # int32 elements: 16 bytes
# All layers are compiled as one function: for training and judging, for adapters of each rank or none, for weights that
# are trained or not. Beyond the limit, 8 by default, a layer would run as it is, many times slower.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
_STAGES = 3  # host buffers in turn, so that the host can lay out ahead of the device


def length_of(tokens: int, budget: int, captured: bool) -> int:
    """The length a stream of so many tokens is padded to.

    Where each length is `captured`, they are few: the budget, or 3/4, 1/2, 3/8 … of it. Else it is what is needed.
    """
    if tokens > budget or not captured:
        return -(-tokens // SHORTEST) * SHORTEST
    best = budget
    for share in (3 / 4, 1 / 2):
        size = budget * share
        while size >= max(tokens, SHORTEST):
            best = min(best, -(-int(size) // TILE) * TILE)
            size /= 2
    return best


@dataclass(frozen=True)
class Captured:
    """The graphs of a stream's forward and backward, with what the one writes and the other reads."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    hidden: torch.Tensor
    slope: torch.Tensor


@dataclass(frozen=True)
class Judging:
    """The graph of a stream's forward alone, with what it writes."""

    forward: torch.cuda.CUDAGraph
    hidden: torch.Tensor


_Key = tuple[bool, bool, int]  # of what a stream launches in training: dropout, a rounded base, rank


@dataclass
class Frame:
    """Buffers of one stream shape, and its graphs once it was seen often enough to be worth them."""

    stream: Stream
    raw: torch.Tensor
    uses: int = 0  # to train in
    looks: int = 0  # to judge in
    graphs: dict[_Key, Captured] = field(default_factory=dict)
    judging: Judging | None = None


class _Staging:
    """Pinned host buffers, used in turn."""

    def __init__(self) -> None:
        self._turn = 0
        self._buffers: list[torch.Tensor | None] = [None] * _STAGES
        self._events: list[torch.cuda.Event | None] = [None] * _STAGES

    def send(self, array: NDArray[np.int32], device: torch.Tensor) -> None:
        """Copies an array into a device tensor of its size, without waiting."""
        self._turn = (self._turn + 1) % _STAGES
        buffer, event = self._buffers[self._turn], self._events[self._turn]
        if event is not None:
            event.synchronize()
        if buffer is None or buffer.numel() < len(array):
            buffer = torch.empty(len(array), dtype=torch.int32, pin_memory=True)
            self._buffers[self._turn] = buffer
        buffer[: len(array)].numpy()[:] = array
        device.copy_(buffer[: len(array)], non_blocking=True)
        event = self._events[self._turn] = torch.cuda.Event()
        event.record()


class GpuRunner:
    """Implements `trainers.lora.runner.Runner` on a CUDA device."""

    shared = True

    def __init__(
        self, base: Base, groups: list[PackedGroup], slots: int, longest: int, budget: int, max_rank: int = 1
    ) -> None:
        """`longest` example in tokens; `budget` tokens of a full stream; `max_rank` of the trials that are expected."""
        self._base = base
        self._groups = groups
        self._slots = slots
        self._longest = -(-longest // 128) * 128
        self.budget = budget
        self._rank = stream_rank(max_rank)
        device = base.device
        self._table = torch.zeros((slots + 1, 6), dtype=torch.int64, device=device)
        self._scales = torch.zeros(slots + 1, device=device)
        self._drops = torch.zeros(slots + 1, device=device)
        self._dropout = [0.0] * (slots + 1)
        self._frames: dict[tuple[int, int], Frame] = {}
        self._staging = [_Staging(), _Staging(), _Staging()]
        self._chunk = chunk_of(base.head.weight.shape[0], "cuda")
        self._pool = torch.cuda.graph_pool_handle()
        self._flying: deque[torch.cuda.Event] = deque()
        self._hidden: torch.Tensor | None = None
        self._captured: Captured | None = None  # what the last forward was replayed from
        self.compile = False
        self._calls: list[Any] = []
        self.graphs = False
        self.kept = Kept()
        self.warm = Warm()
        self._known: set[_Key] = set()  # what layers were compiled for
        self._first = False  # whether the stream under way is compiled for, or captured, or launched before that

    # --- slots and streams ------------------------------------------------------------------------------------------

    def seat(self, index: int, slot: Slot | None) -> None:
        """Puts a trial's buffers in a slot, or frees it."""
        if slot is None:
            self._table[index].zero_()
        else:
            self._table[index] = torch.tensor(slot_row(slot), dtype=torch.int64)
        self._dropout[index] = 0.0 if slot is None else slot.config.dropout
        # Filled, as assigning a number to an element waits for the device (docs/log.md).
        self._scales[index].fill_(0.0 if slot is None else slot.scale)
        self._drops[index].fill_(self._dropout[index])
        if slot is not None and slot.rank > self._rank:
            self._rank = stream_rank(slot.rank)
            self._forget()

    def reach(self, longest: int) -> None:
        """Makes sure that examples of so many tokens can be run: others than those of training may be longer."""
        if longest > self._longest:
            self._longest = -(-longest // 128) * 128
            self._forget()

    def load(self, split: Split, parts: Sequence[Part]) -> tuple[Stream, Targets]:
        """Lays the parts out on the device, in the frame of their shape."""
        laid = lay(split, parts, self._slots)
        tokens = len(laid.ids)
        length = length_of(tokens, self.budget, self.graphs)
        tail = -(-(length - tokens) // self._longest)
        room = -(-(len(laid.lengths) + tail) // EXAMPLES_STEP) * EXAMPLES_STEP
        frame = self._frames.get((length, room))
        if frame is None:
            frame = self._frames[length, room] = self._frame(length, room)
        self._staging[0].send(self._fields(laid, parts, frame.stream), frame.raw)
        frame.stream.tokens = tokens
        frame.stream.dropout = any(self._dropout[part.index] > 0 for part in parts if part.slot is not None)
        frame.stream.rounded = any(part.slot is not None and part.slot.rounds for part in parts)
        return frame.stream, self._targets(laid)

    def _frame(self, length: int, room: int) -> Frame:
        # Every slot, and the tail, may end in a tile that is not full, and every example in such a block.
        spare = self._slots + 1
        sizes = [length, length, length, room + 1, 2 * (self._slots + 1)]
        sizes += [3 * (length // TILE + spare), 3 * (length // WIDE + spare), 3 * (length // BLOCK + room)]
        # Each begins at a multiple of 16 bytes: kernels are compiled anew for an address that is none.
        rooms = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        raw = torch.zeros(sum(rooms), dtype=torch.int32, device=self._base.device)
        parts = [part[:size] for part, size in zip(raw.split(rooms), sizes, strict=True)]
        ids, positions, keys, lengths, bounds, tiles, wide, blocks = parts
        stream = Stream(
            rank=self._rank,
            tokens=0,
            ids=ids[None],
            positions=positions[None],
            lengths=lengths,
            longest=self._longest,
            tiles=tiles.view(-1, 3),
            wide=wide.view(-1, 3),
            blocks=blocks.view(-1, 3),
            bounds=bounds.view(-1, 2),
            table=self._table,
            scales=self._scales,
            drops=self._drops,
            keys=keys,
        )
        return Frame(stream, raw)

    def _fields(self, laid: Laid, parts: Sequence[Part], stream: Stream) -> NDArray[np.int32]:
        """What goes into a frame's buffer, in its order."""
        tokens, length, room = len(laid.ids), stream.ids.shape[1], len(stream.lengths) - 1
        tail = np.zeros(length - tokens, dtype=np.int32)
        # The tail is examples too, of no slot: attention over it stays short and finite.
        ends = np.minimum(np.arange(tokens, length, self._longest, dtype=np.int32) + self._longest, length)
        lengths = np.full(room + 1, length, dtype=np.int32)
        lengths[: len(laid.lengths)] = laid.lengths
        lengths[len(laid.lengths) : len(laid.lengths) + len(ends)] = ends
        bounds = np.zeros((self._slots + 1, 2), dtype=np.int32)
        spans = []
        for part, (start, end) in zip(parts, laid.bounds, strict=True):
            index = part.index if part.slot is not None else self._slots
            spans.append((start, end, index))
            if part.slot is not None:
                bounds[index] = start, end
        spans.append((tokens, length, self._slots))
        assert stream.blocks is not None
        tables = [tiles_of(spans, len(stream.tiles)), tiles_of(spans, len(stream.wide), WIDE)]
        tables.append(blocks_of(lengths, len(stream.blocks)))
        within = np.arange(length - tokens, dtype=np.int32) % self._longest
        keys = np.zeros(length, dtype=np.int32)
        if laid.keys is not None:
            keys[:tokens] = laid.keys.astype(np.uint32).view(np.int32)
        fields = [
            np.concatenate((laid.ids, tail)),
            np.concatenate((laid.positions, within)),
            keys,
            lengths,
            bounds.ravel(),
        ]
        fields += [table.ravel() for table in tables]
        padded_fields = [np.pad(values, (0, -len(values) % ALIGNED)) for values in fields]
        return np.concatenate(padded_fields, dtype=np.int32)

    def _targets(self, laid: Laid) -> Targets:
        scored = laid.scored
        count = len(scored.predict)
        size = -(-count // self._chunk) * self._chunk
        packed = np.zeros((4, size), dtype=np.int32)
        packed[2] = self._slots
        packed[0, :count], packed[1, :count], packed[2, :count] = scored.predict, scored.targets, scored.owners
        packed[3, :count] = scored.weights.view(np.int32)
        raw = torch.empty(packed.size, dtype=torch.int32, device=self._base.device)
        self._staging[1].send(packed.ravel(), raw)
        rows = raw.view(4, size)
        return Targets(rows[0].long(), rows[1].long(), rows[2].long(), rows[3].view(torch.float32))

    # --- running ----------------------------------------------------------------------------------------------------

    def forward(self, stream: Stream, training: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the stream, detached."""
        for group in self._groups:
            group.stream = stream
        frame = next(frame for frame in self._frames.values() if frame.stream is stream)
        self._captured = self._hidden = None  # of a backward that failed, its whole graph
        if not training:
            return self._judge(frame)
        frame.uses += 1
        key = (stream.dropout, stream.rounded, stream.rank)
        known = key in self._known  # else it is compiled by running it once, which no capture may do
        first = key not in frame.graphs if self.graphs else not known
        self._known.add(key)
        with self._counted(first, stream.tokens if first else 0):
            if self.graphs and key not in frame.graphs and known and frame.uses > 1:
                self._capture(frame, key)
            if key in frame.graphs:
                self._captured = frame.graphs[key]
                self._captured.forward.replay()
                return self._captured.hidden
            self._hidden = self._body(stream, training=True)
            return self._hidden.detach()

    @contextmanager
    def _counted(self, first: bool, tokens: int = 0) -> Iterator[None]:
        """Counts the time of what is done the first time: the host's, which compiles and captures."""
        self._first = first
        started_ns = time.monotonic_ns()
        yield
        if first:
            self.warm = Warm(self.warm.ns + time.monotonic_ns() - started_ns, self.warm.tokens + tokens)

    def _judge(self, frame: Frame) -> torch.Tensor:
        """Hidden states of a stream that nothing is learned from.

        Launched layer by layer they take six times as long as those of a model without adapters.
        """
        frame.looks += 1
        if self.graphs and frame.judging is None and frame.looks > 1:
            forward = torch.cuda.CUDAGraph()
            with self._recorded(forward):
                hidden = self._body(frame.stream, training=False)
            frame.judging = Judging(forward, hidden)
            self._keep(hidden)
        if frame.judging is None:
            return self._body(frame.stream, training=False)
        frame.judging.forward.replay()
        return frame.judging.hidden

    def backward(self, stream: Stream, gradient: torch.Tensor) -> None:
        """Adds the adapters' gradients to the slots, from the gradient [T, d] of the last forward's hidden states."""
        with self._counted(self._first):
            if self._captured is not None:
                self._captured.slope.copy_(gradient)
                self._captured.backward.replay()
            else:
                hidden, self._hidden = self._hidden, None
                assert hidden is not None
                hidden.backward(gradient)
        self.pace()

    def step(self, slots: Sequence[Slot], rates: Sequence[float]) -> torch.Tensor:
        """Takes an optimizer step of each slot, all at once."""
        for slot in slots:
            slot.steps += 1
        words = adamw_kernels.fields(slots, rates)
        raw = torch.empty(len(words), dtype=torch.int32, device=self._base.device)
        self._staging[2].send(words, raw)
        return adamw_kernels.step(raw, len(slots), slots[0].copy.dtype)

    def pace(self) -> None:
        """Waits until the device has at most one stream to do."""
        self._flying.append(torch.cuda.Event())
        self._flying[-1].record()
        # One stream is laid out and launched while the device works on another, and no more: at the end of the paid
        # time the device must not be streams behind.
        while len(self._flying) > 1:
            self._flying.popleft().synchronize()

    def ready(self) -> None:
        """From here on layers are compiled and streams captured, in which a model's errors would be hard to read."""
        self.compile = self.graphs = True
        self._forget()  # what ran in these frames was not compiled, and nothing can be while a stream is captured

    def recover(self) -> None:
        """Forgets a forward that came to nothing, and gives its memory back, and that of all graphs."""
        self._hidden = self._captured = None
        self._forget()
        torch.cuda.empty_cache()

    def _forget(self) -> None:
        """Drops all frames and their graphs. A pool whose last graph is gone can take no other."""
        if self._frames:
            torch.cuda.synchronize()  # one may still run
        self._frames.clear()
        self._pool = torch.cuda.graph_pool_handle()
        self.kept = Kept()

    def _body(self, stream: Stream, training: bool) -> torch.Tensor:
        with self.engaged():
            return self.body(stream, training)

    @contextmanager
    def engaged(self) -> Iterator[None]:
        """The model as `body` runs it, also for the recomputation in a backward pass."""
        with packed_attention(self._base.model), self._compiled():
            yield

    def body(self, stream: Stream, training: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the stream, with their graph. Only while `engaged`."""
        embedded = self._base.model.get_input_embeddings()(stream.ids)
        with torch.set_grad_enabled(training):
            hidden: torch.Tensor = self._base.decoder(
                inputs_embeds=embedded.requires_grad_(training),
                position_ids=stream.positions,
                use_cache=False,
                cu_seq_lens_q=stream.lengths,
                max_length_q=stream.longest,
                blocks=stream.blocks,
            ).last_hidden_state[0]
        return hidden

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """The decoder's layers compiled, for the time of the context: other engines run them as they are."""
        layers = layers_of(self._base.decoder) if self.compile else []
        for layer, call in zip(layers, self._calls or [None] * len(layers), strict=True):
            if call is None:
                layer.compile(dynamic=True)
            else:
                layer._compiled_call_impl = call
        self._calls = [layer._compiled_call_impl for layer in layers]
        try:
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None

    def _capture(self, frame: Frame, key: _Key) -> None:
        """Captures forward and backward of a frame. The gradient is zero meanwhile, so no slot's changes."""
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._recorded(forward):
            hidden = self._body(frame.stream, training=True)
        slope = torch.zeros_like(hidden)
        with self._recorded(backward):
            hidden.backward(slope)
        frame.graphs[key] = Captured(forward, backward, hidden.detach(), slope)
        self._keep(hidden, slope)

    def _recorded(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        """What is launched in the context becomes the graph's."""
        # Threads that write checkpoints copy in streams of their own meanwhile, which must not end the capture.
        return torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")

    def _keep(self, *outputs: torch.Tensor) -> None:
        """Counts what a capture keeps."""
        allocated = self.kept.allocated + sum(output.nbytes for output in outputs)
        self.kept = Kept(allocated, held_by_graphs(self._pool))
