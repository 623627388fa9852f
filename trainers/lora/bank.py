"""Where adapters live: one flat buffer a slot, in the order of the model's linear layers.

Linear layers that read the same input (query, key and value; gate and up) form a group, and their A matrices stand
together, so that one pass over the input serves them all. For a trial of padded rank r, with a group of J linears from
`inputs` to `outputs[j]` features, the buffer holds

    [J * r, inputs]                 A of the linears, one after the other
    [r, outputs[j]] for each j      B transposed: its rows are rank components too

Every rank component is a row, so a smaller rank uses the first rows and the padding rows stay exactly zero: with A's
row zero its projection is zero, so B's row has no gradient, and the other way round. Attention groups come first, then
those of the MLP, and a trial that targets one kind has a buffer for that kind alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from trainers.checkpoints import MOMENTS
from trainers.messages import TrialConfig
from trainers.training import INITIALISATION, derive_seed

KINDS = ("attention", "mlp")
RANK_STEP = 16  # the smallest inner dimension of a tensor-core product


def padded(rank: int) -> int:
    """A rank rounded up to what the kernels compute with."""
    return -(-rank // RANK_STEP) * RANK_STEP


def stream_rank(rank: int) -> int:
    """Of how many rank components a linear there is room in a GPU's streams where ranks go up to this: few numbers, for
    each of which layers are compiled."""
    return 1 << (padded(rank) - 1).bit_length()


@dataclass
class Group:
    """Linear layers that read one input. `first`, `seconds`: elements before A and each B, for a rank of one."""

    number: int
    kind: str
    names: list[str]
    linears: list[nn.Linear]
    order: list[int]  # each linear's place among the model's linear layers
    first: int = 0
    seconds: list[int] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """Input features."""
        return self.linears[0].in_features

    @property
    def outputs(self) -> list[int]:
        """Output features of each linear."""
        return [linear.out_features for linear in self.linears]

    @property
    def size(self) -> int:
        """Elements for a rank of one."""
        return len(self.linears) * self.inputs + sum(self.outputs)


@dataclass(frozen=True)
class Place:
    """Where a linear layer's A [rank, inputs] and B [outputs, rank] are in a slot's buffer."""

    name: str
    inputs: int
    outputs: int
    first: int
    second: int


class Layout:
    """The groups of a model with the place of each in a slot's buffer, counted from the start of its kind."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self._places: dict[tuple[str, int], list[Place]] = {}
        self.sizes = dict.fromkeys(KINDS, 0)
        for group in groups:
            at = self.sizes[group.kind]
            group.first = at
            at += len(group.linears) * group.inputs
            group.seconds = []
            for outputs in group.outputs:
                group.seconds.append(at)
                at += outputs
            self.sizes[group.kind] = at

    def kinds(self, targets: str) -> list[str]:
        """The kinds of linear layers that a trial's targets mean."""
        return [kind for kind in KINDS if targets in (kind, "all-linear")]

    def start(self, targets: str, kind: str) -> int | None:
        """Elements, for a rank of one, before a kind's part of the buffer; None where the targets leave it out."""
        kinds = self.kinds(targets)
        return None if kind not in kinds else sum(self.sizes[k] for k in kinds[: kinds.index(kind)])

    def offset(self, targets: str, rank: int, group: Group, element: int) -> int | None:
        """Where a part of a group begins in a buffer; `element` counts for a rank of one. None: not targeted."""
        start = self.start(targets, group.kind)
        return None if start is None else padded(rank) * (start + element)

    def places(self, targets: str, rank: int) -> list[Place]:
        """The targeted linear layers of the model, in its order."""
        rows = padded(rank)
        if (targets, rows) not in self._places:
            found = []
            for group in self.groups:
                for member, (name, order) in enumerate(zip(group.names, group.order, strict=True)):
                    first = self.offset(targets, rank, group, group.first + member * group.inputs)
                    second = self.offset(targets, rank, group, group.seconds[member])
                    if first is not None and second is not None:
                        found.append((order, Place(name, group.inputs, group.outputs[member], first, second)))
            self._places[targets, rows] = [place for _, place in sorted(found, key=lambda pair: pair[0])]
        return self._places[targets, rows]

    def elements(self, targets: str, rank: int) -> int:
        """Elements of a slot's buffer for a trial of this rank."""
        return padded(rank) * sum(self.sizes[kind] for kind in self.kinds(targets))


@dataclass
class Slot:
    """One trial's adapter in flat buffers: fp32 weights, gradient and moments, and the copy that is computed with.

    On a GPU the copy is bf16; on the CPU it is the weights themselves.
    """

    config: TrialConfig
    layout: Layout
    weights: torch.Tensor
    gradient: torch.Tensor  # what backward adds to
    copy: torch.Tensor
    moments: dict[str, torch.Tensor]  # AdamW's by MOMENTS; zero before the first step
    steps: int = 0  # of the optimizer

    @classmethod
    def empty(cls, config: TrialConfig, layout: Layout, dtype: torch.dtype, device: torch.device) -> Slot:
        """Allocates all of a trial's buffers, zero; for want of memory it fails as it comes, not in a step of others.

        Raises ValueError as `check`.
        """
        check(config, layout)
        assert config.targets is not None and config.rank is not None
        compute = torch.bfloat16 if dtype == torch.bfloat16 else dtype
        masters = torch.float32 if compute == torch.bfloat16 else compute
        weights = torch.zeros(layout.elements(config.targets, config.rank), dtype=masters, device=device)
        copy = weights if compute == masters else torch.zeros_like(weights, dtype=compute)
        moments = {name: torch.zeros_like(weights) for name in MOMENTS}
        return cls(config, layout, weights, torch.zeros_like(weights), copy, moments)

    @classmethod
    def fresh(cls, config: TrialConfig, layout: Layout, dtype: torch.dtype, device: torch.device) -> Slot:
        """A trial's buffers with PEFT's initial values. Raises ValueError as `empty` does."""
        slot = cls.empty(config, layout, dtype, device)
        slot.put(initial(config, layout))
        return slot

    @property
    def rounds(self) -> bool:
        """Whether the trial is trained over the base in 8 bits."""
        return self.config.precision == "fp8"

    @property
    def rank(self) -> int:
        """The trial's rank."""
        assert self.config.rank is not None
        return self.config.rank

    @property
    def scale(self) -> float:
        """alpha / rank."""
        assert self.config.alpha is not None
        return self.config.alpha / self.rank

    def offset(self, group: Group, element: int) -> int | None:
        """Where a group's part begins in the buffer; `element` is `first` or one of `seconds`. None: not targeted."""
        assert self.config.targets is not None
        return self.layout.offset(self.config.targets, self.rank, group, element)

    def first(self, buffer: torch.Tensor, group: Group) -> torch.Tensor | None:
        """A of a group in one of the slot's buffers, [J, padded rank, inputs]."""
        at = self.offset(group, group.first)
        if at is None:
            return None
        rows = padded(self.rank)
        return buffer[at : at + len(group.linears) * rows * group.inputs].view(-1, rows, group.inputs)

    def second(self, buffer: torch.Tensor, group: Group, member: int) -> torch.Tensor | None:
        """B transposed of one linear in one of the slot's buffers, [padded rank, outputs]."""
        at = self.offset(group, group.seconds[member])
        if at is None:
            return None
        rows, outputs = padded(self.rank), group.outputs[member]
        return buffer[at : at + rows * outputs].view(rows, outputs)

    def pairs(self, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """The targeted linears of the model, in its order: name, A [rank, inputs] and B [outputs, rank], as views.

        `buffer` is one of the slot's, or laid out as they are, from the start of its storage.
        """
        return pairs(self.config, self.layout, buffer)

    def put(self, weights: torch.Tensor) -> None:
        """Takes weights [elements] from the host: one copy, where one for each linear would keep the device waiting."""
        self.weights.copy_(weights)
        self.round()

    def round(self) -> None:
        """Rounds the weights into the copy that is computed with."""
        if self.copy is not self.weights:
            self.copy.copy_(self.weights)


def check(config: TrialConfig, layout: Layout) -> None:
    """Raises ValueError without rank, alpha or targets, and where the model has nothing that these mean."""
    if config.rank is None or config.alpha is None or config.targets is None:
        raise ValueError(f"trial {config.number}: LoRA needs rank and alpha, and targets")
    if not any(layout.sizes[kind] for kind in layout.kinds(config.targets)):
        raise ValueError(f"trial {config.number}: the model has no linear layers for targets {config.targets}")


def pairs(
    config: TrialConfig, layout: Layout, buffer: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The parts of a trial's buffer, as `Slot.pairs`."""
    assert config.targets is not None and config.rank is not None
    for place in layout.places(config.targets, config.rank):
        first = buffer.as_strided((config.rank, place.inputs), (place.inputs, 1), place.first)
        second = buffer.as_strided((place.outputs, config.rank), (1, place.outputs), place.second)
        yield place.name, first, second


def initial(config: TrialConfig, layout: Layout) -> torch.Tensor:
    """A trial's initial weights, on the host: A is random, B is zero. From any thread. Raises ValueError as `check`.

    The distribution is PEFT's own, Kaiming-uniform with a = sqrt(5). The numbers come from one fp32 CPU generator over
    the linears in the model's order, so they depend on nothing that ran before, and on no device or width.
    """
    check(config, layout)
    assert config.targets is not None and config.rank is not None
    generator = torch.Generator().manual_seed(derive_seed(config.seed, INITIALISATION))
    weights = torch.zeros(layout.elements(config.targets, config.rank), dtype=torch.float32)
    for _, first, _ in pairs(config, layout, weights):
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
    return weights
