"""One process's part in the training of a full-parameter trial: its share of the rows through its part of the weights.

With one process the share is everything. With more, every process calls the same methods with the same arguments; the
sums over processes are made here, and nothing here knows who called.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from trainers import generation
from trainers.engine import Kept, Warm
from trainers.full import optimizers
from trainers.full.weights import Weights
from trainers.lora.head import Targets
from trainers.lora.runner import CpuRunner
from trainers.lora.stream import Part, Stream
from trainers.loss import chunked_nll, compare_with_own, compared_rows, completion_nll, flat_batch, token_nll
from trainers.messages import Optimizer, TrialConfig
from trainers.models import Base
from trainers.named import ModelError
from trainers.splits import Split, cut

if TYPE_CHECKING:
    from trainers.lora.gpu import GpuRunner


@dataclass(frozen=True)
class Options:
    """How trials are trained. `micro_tokens` go through the model at once, in each process."""

    micro_tokens: int
    optimizer: Optimizer = "adamw"
    checkpointing: bool = False
    compiled: bool = True  # layers, on a GPU
    graphs: bool = False  # a stream's passes are captured, on a GPU; the weights' gradients are fixed then
    gathered: bool = False  # of several processes, each keeps the whole weights from forward to backward


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: fp32 weights by parameter and the optimizer's tensors, on the host; `where` it is."""

    step: int
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    where: str = ""


def deal(lengths: NDArray[np.int64], hands: int) -> list[list[int]]:
    """Deals places out by their lengths so that each hand has about as many tokens; a hand keeps their order."""
    tokens = [0] * hands
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for place in np.argsort(-lengths, kind="stable").tolist():
        hand = tokens.index(min(tokens))
        tokens[hand] += int(lengths[place])
        dealt[hand].append(place)
    return [sorted(hand) for hand in dealt]


class Replica:
    """Trains and judges with one process's part of the weights, process `rank` of `ranks`."""

    def __init__(self, weights: Weights, train: Split, longest: int, options: Options) -> None:
        """`longest` row of training and validation, in tokens."""
        self.weights = weights
        self.micro_tokens = options.micro_tokens
        self.rank, self.ranks = 0, 1
        self.padding_free = True  # through our attention; else by position ids through the model's own
        self.train = train
        self.longest = longest
        self._options = options
        self._runner: CpuRunner | GpuRunner | None = None
        self._checked = False
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def base(self) -> Base:
        """The model that runs."""
        return self.weights.base

    # --- a trial comes and goes -------------------------------------------------------------------------------------

    def open(self, config: TrialConfig, saved: Saved | None) -> None:
        """Puts the trial in, fresh or as it was saved. Raises CheckpointError."""
        before = self.base
        self.weights.open(None if saved is None else saved.weights)
        if self.base is not before:
            self._runner = None
        masters = self.weights.masters
        self._optimizer = optimizers.make(self._options.optimizer, config, list(masters.values()))
        if saved is not None and saved.step > 0:
            optimizers.begin(self._optimizer, saved.step)
            state = optimizers.tensors(self._optimizer, masters)
            if self.ranks == 1:  # of several, the first one looked before it told the others
                optimizers.check(state, saved.moments, saved.where)
            for name, tensor in state.items():
                self.weights.scatter(name, saved.moments.get(name), tensor)
        if self._options.checkpointing:
            _checkpoint_layers(self.base)

    def without_trial(self) -> AbstractContextManager[None]:
        """The base model as it was before the trial, for the time of the context."""
        return self.weights.without_trial()

    def check(self) -> None:
        """Raises what a process met of which the others could not be told yet: here there are none."""

    def close(self) -> None:
        """Takes the trial out."""
        self._optimizer = None
        if self._options.checkpointing:
            _keep_activations(self.base)
        self.weights.close()
        if self.ranks > 1:
            # The model that was sharded refers to itself, and the runner to it: its shards would stay beside the next.
            self._runner = None
            gc.collect()

    def gather(self, moments: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Whole masters, and with `moments` whole optimizer state, by name; empty where no checkpoint is written."""
        assert self._optimizer is not None
        masters = self.weights.masters
        found: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = {}, {}
        named = dict(masters), optimizers.tensors(self._optimizer, masters) if moments else {}
        for into, tensors in zip(found, named, strict=True):
            for name, tensor in tensors.items():
                whole = self.weights.gather(name, tensor.detach())
                if whole is not None:
                    into[name] = whole
        return found

    # --- training ---------------------------------------------------------------------------------------------------

    def step(self, rows: Sequence[int], seed: int, rate: float, clip_norm: float) -> torch.Tensor:
        """One optimizer step on a batch. Returns mean loss over its completion tokens and gradient norm, fp64 [2].

        Nothing here waits for a GPU.
        """
        assert self._optimizer is not None
        torch.manual_seed(seed + self.rank)
        self.base.model.train()
        completion = int(self.train.completions[list(rows)].sum())
        total = torch.zeros((), device=self.base.device)
        # FSDP2 takes the mean of the processes' gradients, where the sum is wanted.
        weight = self.ranks / completion
        if self.graphs:
            self._make_room(0)
            for part in self._parts(rows, self.train):
                total += self._replayed([rows[place] for place in part], weight)
        else:
            total += self._passed(rows, weight)
        with torch.no_grad():
            norm = get_total_norm(self.weights.gradients())
            if self.ranks > 1:
                both = torch.stack((total / self.ranks, norm.square()))
                distributed.all_reduce(both)
                total, norm = both[0], both[1].sqrt()
            clip_grads_with_norm_(list(self.weights.masters.values()), clip_norm, norm)
            optimizers.set_rate(self._optimizer, rate)
            self._optimizer.step()
            self.weights.stepped()
            return torch.stack((total.double(), norm.double()))

    def _passed(self, rows: Sequence[int], weight: float) -> torch.Tensor:
        """Adds the gradients of the rows' loss, and returns the loss."""
        total = torch.zeros((), device=self.base.device)
        with self._engaged():
            # Gradients are summed over processes after each part: kept whole until the last one, they would take
            # 4 bytes a parameter on every GPU.
            for part in self._parts(rows, self.train):
                # Who has no rows left takes part in the collectives, with a row that counts nothing.
                given = [rows[place] for place in part] if part else [rows[0]]
                loss = self.weights.run(self._loss, given, weight if part else 0.0)
                loss.backward()
                if self._runner is not None:
                    self._runner.pace()
                total += loss.detach()
        return total

    def _replayed(self, rows: list[int], weight: float) -> torch.Tensor:
        """The same of one part, from graphs: launched one by one, a small model's kernels take less time than that.

        The head is outside of them, since its chunks are as many as there are scored tokens.
        """
        assert self._runner is not None
        stream, targets = self._runner.load(self.train, _all_of(rows, weight))
        hidden = self._runner.forward(stream).detach().requires_grad_()
        loss = self._nll(hidden, targets)
        loss.backward()
        assert hidden.grad is not None
        self._runner.backward(stream, hidden.grad)
        return loss.detach()

    def _parts(self, rows: Sequence[int], split: Split) -> list[list[int]]:
        """This process's places in `rows`, cut to what goes through the model at once.

        The list is as long for every process: what goes through the model is a collective.
        """
        lengths = split.lengths[np.asarray(rows, dtype=np.int64)]
        dealt = deal(lengths, self.ranks) if self.ranks > 1 else [list(range(len(rows)))]
        hands = [cut(hand, lengths, self.micro_tokens) for hand in dealt]
        rounds = max(len(hand) for hand in hands)
        mine = hands[self.rank]
        return mine + [[] for _ in range(rounds - len(mine))]

    def _loss(self, rows: list[int], weight: float) -> torch.Tensor:
        """The rows' loss, each completion token's times `weight`, with its graph."""
        return self._nll(*self._hidden(self.train, rows, weight, training=True))

    def _nll(self, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
        scored = hidden.index_select(0, targets.predict)
        return chunked_nll(scored, self.base.head.weight, targets.tokens, targets.weights)

    def _hidden(self, split: Split, rows: list[int], weight: float, training: bool) -> tuple[torch.Tensor, Targets]:
        """Hidden states of rows end to end, and where their completion tokens are predicted."""
        if self._runner is None:
            batch = flat_batch([split[row] for row in rows], self.base.device)
            decoder = self.base.decoder(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
            weights = torch.full(batch.targets.shape, weight, device=self.base.device)
            targets = Targets(batch.predict, batch.targets, torch.zeros_like(batch.targets), weights)
            return decoder.last_hidden_state[0], targets
        stream: Stream
        stream, targets = self._runner.load(split, _all_of(rows, weight))
        if self.graphs and not training:
            return self._runner.forward(stream, training=False), targets
        return self._runner.body(stream, training), targets

    # --- judging ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def losses(self, split: Split, rows: Sequence[int]) -> torch.Tensor:
        """Each row's negative log-likelihood, summed over its completion tokens (nats), fp64 [rows]."""
        self.base.model.eval()
        self._make_room(int(split.lengths[np.asarray(rows, dtype=np.int64)].max(initial=1)))
        sums = torch.zeros(len(rows), dtype=torch.float64, device=self.base.device)
        with self._engaged():
            for part in self._parts(rows, split):
                given = [rows[place] for place in part] if part else [rows[0]]
                found = self.weights.run(self._row_losses, split, given)
                if part:
                    sums[torch.tensor(part, device=sums.device)] = found
        if self.ranks > 1:
            distributed.all_reduce(sums)
        return sums

    def _row_losses(self, split: Split, rows: list[int]) -> torch.Tensor:
        hidden, targets = self._hidden(split, rows, 1.0, training=False)
        found = token_nll(hidden[targets.predict], self.base.head.weight, targets.tokens)
        owners = torch.from_numpy(np.repeat(np.arange(len(rows)), split.completions[rows])).to(found.device)
        sums = torch.zeros(len(rows), dtype=torch.float64, device=found.device)
        return sums.index_add_(0, owners, found[: len(owners)].double())  # what follows is padding

    def generate(
        self, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations. Every process makes all of them: what they run through together is the model.

        Layers run as they are: compiled ones would be compiled once a layer, since a cache knows which one it is.
        """
        with torch.compiler.set_stance("force_eager"):
            model, tokenizer = self.base.model, self.base.tokenizer
            return generation.greedy(model, tokenizer, prompts, max_new_tokens, self.micro_tokens, ends)

    # --- between trials ---------------------------------------------------------------------------------------------

    @property
    def graphs(self) -> bool:
        """Whether steps are captured."""
        return self._options.graphs

    @property
    def warm(self) -> Warm:
        """See Engine."""
        return Warm() if self._runner is None else self._runner.warm

    def kept(self) -> Kept:
        """What `rest` would give back."""
        graphs = Kept() if self._runner is None else self._runner.kept
        return Kept(graphs.allocated + self.weights.kept_bytes, graphs.in_graphs)

    def without_graphs(self) -> None:
        """Steps are launched kernel by kernel from the next trial on."""
        self._options, self._runner = replace(self._options, graphs=False), None

    def rest(self) -> None:
        """Gives back graphs, and the gradients that they add to."""
        if self._runner is not None:
            self._runner.recover()
        self.weights.forget()

    # --- running ----------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Compares the loss of a few rows in one stream with the model's own; settles how streams are run from then on.

        A model whose attention is not the one that streams know runs through its own. Raises ModelError on a mismatch.
        """
        rows = compared_rows(self.train)
        examples = [self.train[row] for row in rows]
        try:
            compare_with_own(self.base, examples, float(self.losses(self.train, rows).sum()))
        except (ImportError, TypeError, ValueError, ModelError):
            self.padding_free, self._runner = False, None
            with torch.no_grad():
                nll = completion_nll(self.base.decoder, self.base.head, flat_batch(examples, self.base.device))
            compare_with_own(self.base, examples, float(nll))
        self._checked, self._runner = True, None

    def _make_room(self, longest: int) -> None:
        """Makes the runner anew if a row is longer than it was made for."""
        if self.padding_free and (self._runner is None or longest > self.longest):
            self.longest = max(longest, self.longest)
            self._runner = self._make_runner()

    def _make_runner(self) -> CpuRunner | GpuRunner:
        """Streams of no adapters: those of the packed engine, with nothing packed."""
        if self.base.device.type == "cuda":
            from trainers.lora.gpu import GpuRunner

            runner = GpuRunner(self.base, [], 0, self.longest, self.micro_tokens)
            # Before, a model's errors would be hard to read.
            runner.compile = self._options.compiled and self._checked and not self.weights.compiled
            runner.graphs = self._options.graphs and self._checked
            return runner
        return CpuRunner(self.base, [], 0)

    @contextmanager
    def _engaged(self) -> Iterator[None]:
        """The model as streams run it, for forward and backward: layers that keep no activations run in both."""
        self._make_room(0)
        if self._runner is None:
            yield
            return
        with self._runner.engaged():
            yield


def _all_of(rows: list[int], weight: float) -> list[Part]:
    """A stream of the base model's alone: its rows are all that is in it."""
    return [Part(0, None, rows, list(range(len(rows))), 0, weight)]


def _checkpoint_layers(base: Base) -> None:
    """Layers keep their inputs alone and are run again for the gradients (Chen et al., arXiv 1604.06174)."""
    model: Any = base.model
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"{base.name}: does not support activation checkpointing; set checkpointing: false")
    # transformers gave these methods new names in 5.2x.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _keep_activations(base: Base) -> None:
    model: Any = base.model
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
