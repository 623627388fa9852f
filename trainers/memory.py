"""Predicted peak GPU memory of a configuration, part by part. Torch-free: the orchestrator imports this module.

LoRA trials train in the packed engine over frozen base weights, bf16 or quantised. A full-parameter trial has bf16
weights, fp32 masters, fp32 gradients and AdamW's moments: 18 bytes a parameter (Rajbhandari et al., "ZeRO", 2020, with
gradients in fp32). What compiled layers keep for backward, in bytes a token, is

    2 (group inputs + norm inputs + q, k, v + gates) + 4 (heads + norm rows)       of the model
    2 r linears                                                                    of adapters of a stream's rank r
    2 hidden for each layer, and one layer whole while it is computed again        with checkpointing

That is what torch's min-cut partitioner keeps of the layers' graphs: inputs of linear layers (once where several read
one tensor), inputs of norms, the attention's operands (its output is the next linear's input), what activation
functions read, the scaled projections of every linear, and fp32 statistics. tests/trainers/test_shapes.py compares it
with the partitioner, within 0.3 %. It differs from Korthikanti et al., "Reducing Activation Recomputation" (2022), by
flash attention, grouped key heads and gated MLPs.

The sum is what the allocator hands out. The context, the libraries' workspaces and fragmentation come on top: `room`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trainers.messages import Method, Optimizer, Targets, TrialConfig

GIB = 2**30
LEAST_MARGIN, MARGIN = 2 * GIB, 0.08  # of a GPU's memory, for what the sum does not count: the larger of the two
MICRO_TOKENS = 8192  # through the model at once on a GPU (trainers/training.py), unless a probe finds another length
SHARDED_TOKENS = 16384  # the same on each of several GPUs, where it fits: every part gathers all weights anew
CAPTURED = 2**29  # parameters up to which full training runs from CUDA graphs: launching takes longer than computing
SHORTEST_STREAM = 2048  # tokens: what a probe tries first (trainers/lora/probe.py)
BF16_BYTES = 2.0  # a weight
ROUNDED_BYTES = 2  # a weight, beside bf16: rounded to 8 bits for the forward pass and for the backward pass
RANK_STEP = 16  # ranks are computed with in multiples (trainers/lora/bank.py)
ADAPTER_BYTES = 18  # a parameter: fp32 weight, gradient and two moments, and the bf16 copy that is computed with
HEAD_LOGITS, HEAD_ROWS = 2**28, 512  # at once (trainers/lora/head.py): logits at most, tokens at least
MOMENTS = {"adamw": 8.0, "adamw-8bit": 2 * (1 + 4 / 256)}  # bytes a parameter; 8-bit: one fp32 scale a block of 256
WORDS = {
    "weights": "base weights",
    "adapters": "adapters: fp32 weights, gradients, moments; bf16 copy",
    "masters": "fp32 masters",
    "moments": "optimizer moments",
    "gradients": "fp32 gradients",
    "activations": "activations kept for backward",
    "passing": "one layer's backward in passing",
    "logits": "a chunk of logits with its gradient",
    "gathered": "layers gathered from the other GPUs",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What memory depends on of a model; `trainers/shapes.py` reads it off the modules, never off the configuration.

    Elements and bytes are a token's, summed over all layers.
    """

    parameters: int
    embedding: int  # parameters of the token embedding
    tied: bool  # the head is the embedding
    layers: int
    hidden: int
    vocabulary: int
    largest_layer: int  # parameters
    linears: dict[str, list[list[int]]]  # attention, mlp: [inputs, outputs, how many] of the layers' linears
    group_inputs: int  # elements that linears read, a tensor that several read once
    norm_inputs: int  # elements that norms read and nobody else keeps
    norm_rows: int  # statistics of norms
    attention: int  # elements of queries, keys and values
    heads: int  # query heads
    gates: int  # elements that activation functions read: outputs of the MLP's first linears
    outside: int  # bytes that what is around the layers keeps, over frozen weights
    outside_trained: int  # the same where all weights are trained
    # Of one weight of the layers' linears, with its share of the scales: bf16, quantised, or bf16 and its roundings.
    weight_bytes: float = BF16_BYTES

    def per_rank(self, targets: Targets) -> int:
        """Parameters of an adapter for each unit of rank."""
        kinds = [kind for kind in self.linears if targets in (kind, "all-linear")]
        return sum((i + o) * count for kind in kinds for i, o, count in self.linears[kind])

    @property
    def columns(self) -> int:
        """Linear layers inside of the decoder's layers."""
        return sum(count for shapes in self.linears.values() for *_, count in shapes)

    @property
    def base_bytes(self) -> int:
        """Bytes of frozen base weights."""
        quantised = sum(i * o * count for shapes in self.linears.values() for i, o, count in shapes)
        return round(2 * self.parameters - (2 - self.weight_bytes) * quantised)

    @property
    def head(self) -> int:
        """Parameters of the head, its own or the embedding's."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What trains at once. `tokens` go through the model together; a batch of more than one such part `accumulates`."""

    method: Method
    tokens: int
    targets: Targets = "all-linear"
    rank: int = 16
    slots: int = 1
    optimizer: Optimizer = "adamw"
    checkpointing: bool = False
    processes: int = 1  # that share a full-parameter trial's state, one a GPU
    accumulates: bool = False
    gathered: bool = False  # those processes keep the whole weights from forward to backward


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment when most are taken, by part (`WORDS`), of one GPU."""

    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def moving(self) -> int:
        """Bytes of the parts that a correction scales: those that are estimated and not counted."""
        return sum(self.parts.get(name, 0) for name in ("activations", "passing", "logits"))


@dataclass(frozen=True)
class Correction:
    """What measured peaks taught: a factor on the activations, and how far corrected predictions still are off."""

    factor: float = 1.0
    measured: int = 0  # peaks it was learned from
    error: float | None = None  # median of |predicted - measured| / measured
    worst: float | None = None

    def apply(self, peak: Peak) -> Peak:
        """The peak with its activations corrected."""
        moving = {n: round(self.factor * b) for n, b in peak.parts.items() if n in ("activations", "passing", "logits")}
        return Peak({**peak.parts, **moving})

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def padded(rank: int) -> int:
    """A rank rounded up to what an adapter is stored with."""
    return -(-rank // RANK_STEP) * RANK_STEP


def stream_rank(rank: int) -> int:
    """The rank that projections of all trials are computed with: the next power of two of the largest."""
    return 1 << (padded(rank) - 1).bit_length()


def room(memory: int) -> int:
    """Bytes of a GPU's memory that a prediction may fill."""
    return max(0, memory - max(LEAST_MARGIN, math.ceil(MARGIN * memory)))


def slot_bytes(shape: Shape, targets: Targets, rank: int) -> int:
    """Bytes of one trial's adapter with gradient and optimizer state."""
    return ADAPTER_BYTES * padded(rank) * shape.per_rank(targets)


def layer_token(shape: Shape, rank: int = 0) -> int:
    """Bytes that all compiled layers keep of one token; `rank` is the largest adapter's, 0 without any."""
    elements = shape.group_inputs + shape.norm_inputs + shape.attention + shape.gates
    projections = stream_rank(rank) * shape.columns if rank else 0
    return 2 * (elements + projections) + 4 * (shape.heads + shape.norm_rows)


def head_rows(vocabulary: int) -> int:
    """Tokens that meet the head at once on a GPU: a power of two."""
    return max(HEAD_ROWS, 1 << ((HEAD_LOGITS // vocabulary).bit_length() - 1))


def _passing(shape: Shape, tokens: int) -> int:
    # Gradients of a layer's output, of its MLP's activation and of what that was computed from, and of the MLP's input.
    gates = shape.gates // shape.layers
    return 2 * tokens * (2 * shape.hidden + gates + gates // 2)


def _logits(shape: Shape, tokens: int) -> int:
    # The last chunk's gradient is still there when the next one's logits and their gradient are computed.
    rows = head_rows(shape.vocabulary)
    return 2 * rows * shape.vocabulary * (3 if tokens > rows else 2)


def peak(shape: Shape, setup: Setup) -> Peak:
    """Predicts what one GPU holds when most is taken."""
    return _lora(shape, setup) if setup.method == "lora" else _full(shape, setup)


def _lora(shape: Shape, setup: Setup) -> Peak:
    tokens = setup.tokens
    # Beside what the layers keep: the embedded stream's gradient, the hidden states, their gradient, and its copy that
    # the captured backward reads.
    ends = shape.outside + 4 * 2 * shape.hidden
    # Gradients of the MLP's first linears in 8 bits, beside those in bf16.
    rounded = tokens * shape.gates // shape.layers if shape.weight_bytes > BF16_BYTES else 0
    return Peak(
        {
            "weights": shape.base_bytes,
            "adapters": setup.slots * slot_bytes(shape, setup.targets, setup.rank),
            "activations": tokens * (layer_token(shape, setup.rank) + ends),
            # Forward and backward are captured, so that their memory is not the head's between them.
            "passing": _passing(shape, tokens) + rounded,
            "logits": _logits(shape, tokens),
        }
    )


def _full(shape: Shape, setup: Setup) -> Peak:
    """The largest of three moments: the loss, the start of backward, and the optimizer's step."""
    tokens, count = setup.tokens, shape.parameters / setup.processes
    states = {"weights": 2 * count, "masters": 4 * count, "moments": MOMENTS[setup.optimizer] * count}
    if setup.processes > 1:
        # Sharded masters are all the weights there are. Gathered in bf16: all of them, or two layers in turn and what
        # is outside of layers; a layer's gradients are added up over the processes in fp32.
        del states["weights"]
        around = shape.embedding + (0 if shape.tied else shape.head)
        whole = shape.parameters if setup.gathered else 2 * shape.largest_layer + around
        states["gathered"] = 2 * whole + 4 * shape.largest_layer
    # What graphs add gradients to is there all the time.
    captured = captures(shape.parameters, checkpointing=setup.checkpointing, processes=setup.processes)
    before = {**states, "gradients": 4 * count if setup.accumulates or captured else 0}
    layers = layer_token(shape)
    kept = 2 * shape.hidden * shape.layers if setup.checkpointing else layers
    activations = tokens * (
        kept + shape.outside_trained + 2 * 2 * shape.hidden
    )  # and hidden states with their gradient
    again = tokens * layers // shape.layers if setup.checkpointing else 0
    moments: list[dict[str, float]] = [
        # The head's gradient is summed in fp32, and kept in bf16 until backward, which scales it.
        {**before, "activations": activations, "logits": _logits(shape, tokens) + 4 * shape.head},
        {**before, "activations": activations, "passing": again + _passing(shape, tokens), "logits": 4 * shape.head},
        {**states, "gradients": 4 * count, "passing": 2 * shape.embedding},
    ]
    most = max(moments, key=lambda parts: sum(parts.values()))
    return Peak({name: round(size) for name, size in most.items() if size})


def captures(parameters: int, *, checkpointing: bool, processes: int) -> bool:
    """Whether a GPU's full-parameter steps are CUDA graphs."""
    return parameters <= CAPTURED and not checkpointing and processes == 1


def full_tokens(
    batch_sizes: Sequence[int], longest: int, processes: int = 1, most: int = MICRO_TOKENS
) -> tuple[int, bool]:
    """Tokens of a full-parameter trial that go through the model at once in each process, for examples of at most
    `longest` tokens and parts of a batch of at most `most`, and whether a process's share of a batch is more than that.
    """
    batch = -(-max(batch_sizes) // processes) * longest
    return max(min(most, batch), longest), batch > max(most, longest)


def slots_beside(shape: Shape, setup: Setup, space: int, correction: Correction, most: int) -> int:
    """How many such trials fit beside each other in one stream of the setup's length, in `space` bytes; at most
    `most`, 0 where not even one does."""
    alone = correction.apply(peak(shape, replace(setup, slots=1))).total
    each = slot_bytes(shape, setup.targets, setup.rank)
    return max(0, min(most, 1 + (space - alone) // each)) if alone <= space else 0


def needs_at_least(config: TrialConfig, failed: TrialConfig) -> bool:
    """Whether a configuration needs at least the memory of one that ran out of it: the same method, and no part less.

    A batch counts in full-parameter training alone: in a pack, streams are as long whatever the batches are.
    """
    if config.method != failed.method:
        return False
    if config.method == "full":
        return config.batch_size >= failed.batch_size
    wide = config.targets == failed.targets or config.targets == "all-linear"
    return wide and padded(config.rank or 0) >= padded(failed.rank or 0)


def correct(predicted: Sequence[Peak], measured: Sequence[int]) -> Correction:
    """Learns from measured peaks (bytes) of configurations that were predicted.

    The factor is the median over the peaks of what is measured beyond the counted parts (weights, adapters, states), as
    a multiple of the estimated ones, each weighted by how much of the peak is estimated: where that is little, it says
    little. It stays between a half and two: beyond that something else is wrong. One peak counts half.
    """
    pairs = [(p, m) for p, m in zip(predicted, measured, strict=True) if p.moving > 0 and m > 0]
    if not pairs:
        return Correction()
    ratios = sorted(((m - (p.total - p.moving)) / p.moving, p.moving / p.total) for p, m in pairs)
    factor = min(max(_weighted_median(ratios), 0.5), 2.0)
    factor **= len(pairs) / (len(pairs) + 1)
    learned = Correction(factor)
    errors = [abs(learned.apply(p).total - m) / m for p, m in pairs]
    return Correction(factor, len(pairs), statistics.median(errors), max(errors))


def _weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """The median of sorted (value, weight) pairs."""
    half, seen = sum(weight for _, weight in values) / 2, 0.0
    for value, weight in values:
        seen += weight
        if seen >= half:
            return value
    raise ValueError("no values")
