"""The packed LoRA engine: many trials train over one frozen base, each in a slot of its own.

Continuous batching, but for training: every micro-step lays whole examples of several trials end to end, runs them
through the base once, and adds each trial's adapter to its own tokens. A trial whose batch is complete takes its
optimizer step, whatever its neighbours are at. What a trial trains depends on its configuration and the data alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from trainers.checkpoints import CheckpointError, State, holds, write_folder, write_state
from trainers.engine import Evaluation, Kept, Position, TrialFailed, Warm
from trainers.generation import greedy
from trainers.health import Health
from trainers.lora import adapter_files, float8, packing
from trainers.lora.adapted import adapted
from trainers.lora.bank import Layout, Slot
from trainers.lora.head import score
from trainers.lora.linear import PackedGroup, pack, unpack
from trainers.lora.models import find_groups
from trainers.lora.packing import Batch, Live, Report
from trainers.lora.runner import CpuRunner, Runner
from trainers.lora.stream import Part
from trainers.loss import compare_with_own, compared_rows
from trainers.messages import FailureCode, Precision, Targets, TrialConfig
from trainers.models import Base, one_line, target_modules
from trainers.named import ModelError
from trainers.splits import Split, batches, cut
from trainers.training import DROPOUT, MICRO_TOKENS, derive_seed, evaluation, is_out_of_memory, rate

T = TypeVar("T")
_Ready = tuple[adapter_files.Content, list[NDArray[np.int64]]]  # of a trial that comes, and its batches
_REPORTS_AHEAD = 2  # steps whose figures may still be on their way from the GPU


class LoraEngine:
    """Trains LoRA trials in `slots` slots; implements `trainers.engine.Engine`. Adapters are kept in fp32."""

    method = "lora"

    def __init__(
        self,
        base: Base,
        train: Split,
        validation: Split,
        rung_rows: int,
        micro_tokens: int | None = None,
        slots: int = 1,
        max_rank: int = 1,
        precision: Precision = "bf16",
    ) -> None:
        """`micro_tokens` go through the model at once: of each trial on the CPU, of all together on a GPU.

        `max_rank` is what trials are expected to have at most: for a larger one a GPU's layers are compiled anew.
        With a `precision` of fp8 the base is rounded too, for trials that want it; all are judged by its whole weights.
        """
        self.base = base
        self.train = train
        self.validation = validation
        self.rung_rows = rung_rows
        self.micro_tokens = micro_tokens or MICRO_TOKENS[base.device.type]
        self.slots = slots
        self._max_rank = max_rank
        groups = find_groups(base)
        self._layout = Layout(groups)
        self._packed = [PackedGroup(group, precision) for group in groups]
        self._trials: dict[int, Live] = {}
        self._ready: dict[tuple[TrialConfig, Path | None], _Ready] = {}
        self._reports: deque[Report] = deque()
        self._failures: list[TrialFailed] = []
        self._known_endings: dict[Targets, list[str]] = {}
        self.trained_tokens = 0  # real ones, of all trials
        self._computed = 0
        self._runner: Runner = self._make_runner()
        self._sums = torch.zeros(slots + 1, dtype=torch.float64, device=base.device)
        self._sums_of = self._sums.unbind()  # views
        self._verify(precision)

    def _make_runner(self) -> Runner:
        longest = int(max(self.train.lengths.max(), self.validation.lengths.max()))
        if self.base.device.type == "cuda":
            from trainers.lora.gpu import GpuRunner

            return GpuRunner(self.base, self._packed, self.slots, longest, self.micro_tokens, self._max_rank)
        return CpuRunner(self.base, self._packed, self.slots)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The base with packed layers; outside of the context every module of it is what it was."""
        for packed in self._packed:
            pack(packed)
        try:
            yield
        finally:
            for packed in self._packed:
                unpack(packed)

    @torch.no_grad()
    def _verify(self, precision: Precision) -> None:
        """Compares the loss of a few examples in one stream with the model's own. Raises ModelError on a mismatch."""
        rows = compared_rows(self.train)
        part = Part(self.slots, None, rows, rows, 0, 1.0)
        try:
            with self._at_work():
                ours = float(self._nll(self.train, part))
                rounded = ours if precision == "bf16" else float(self._nll(self.train, part, rounded=True))
        except (TypeError, ValueError) as error:
            raise ModelError(f"{self.base.name}: cannot be packed: {one_line(error)}; use another model") from error
        compare_with_own(self.base, [self.train[row] for row in rows], ours)
        if precision == "fp8":
            float8.compare(self.base.name, ours, rounded, int(self.train.completions[rows].sum()))
        self._runner.ready()

    # --- coming and going -------------------------------------------------------------------------------------------

    def admit(self, config: TrialConfig, checkpoint: Path | None, until_tokens: int | None) -> Position:
        """Puts the trial in a slot. Raises TrialFailed; RuntimeError where no slot is free or the base is taken."""
        taken = {live.index for live in self._trials.values()}
        free = [index for index in range(self.slots) if index not in taken]
        if not free or (self.base.busy and not taken):
            raise RuntimeError(f"trial {config.number} has no free slot")
        if config.method != self.method:
            raise RuntimeError(f"trial {config.number} is of method {config.method}, this engine of {self.method}")
        failure: tuple[FailureCode, str] | None = None
        try:
            live = self._build(config, free[0], checkpoint)
        except (CheckpointError, ModelError, OSError, SafetensorError, ValueError) as error:
            failure = "error", str(error)
        except RuntimeError as error:
            failure = "out_of_memory" if is_out_of_memory(error) else "error", str(error).splitlines()[0]
        if failure is not None:
            raise TrialFailed(config.number, *failure)
        live.until_tokens = until_tokens
        self._trials[config.number] = live
        self.base.busy = True
        self._runner.seat(live.index, live.slot)
        return live.position

    def _build(self, config: TrialConfig, index: int, checkpoint: Path | None) -> Live:
        ready = self._ready.pop((config, checkpoint), None)
        if config.examples < 1 or config.batch_size < 1:
            raise ValueError(f"examples {config.examples} and batch_size {config.batch_size} must be at least 1")
        content, plan = ready or self._make_ready(config, checkpoint)
        slot = Slot.empty(config, self._layout, self.base.model.dtype, self.base.device)
        adapter_files.fill(slot, content)
        state = content.state
        health = Health(len(plan), resumed=state.step > 0)
        return Live(
            config=config, index=index, slot=slot, batches=plan, health=health, step=state.step, tokens=state.tokens
        )

    @property
    def warm(self) -> Warm:
        """See Engine."""
        return self._runner.warm

    def prepare(self, config: TrialConfig, checkpoint: Path | None) -> Callable[[], None] | None:
        """What makes ready, in any thread, all that `admit` needs of the host. What it can't, `admit` will say."""

        def work() -> None:
            with suppress(CheckpointError, OSError, SafetensorError, ValueError):
                self._ready[config, checkpoint] = self._make_ready(config, checkpoint)

        return work if self.slots > 1 else None

    def _make_ready(self, config: TrialConfig, checkpoint: Path | None) -> _Ready:
        content = adapter_files.content_of(config, self._layout, self.train.rows, checkpoint)
        return content, batches(config, self.train.rows)

    def target(self, trial: int, until_tokens: int | None) -> None:
        """Sets where the trial stands still next; None is its end."""
        self._of(trial).until_tokens = until_tokens

    def position(self, trial: int) -> Position:
        """Where the trial stands."""
        return self._of(trial).position

    def train_loss(self, trial: int) -> float:
        """Mean training loss (nats a completion token) over the steps since the last call; nan if there were none."""
        self._settle(0)
        return self._of(trial).take_loss()

    def occupancy(self) -> float:
        """Real tokens of training over tokens computed, since the start; nan before."""
        return self.trained_tokens / self._computed if self._computed else math.nan

    def forget_tokens(self) -> None:
        """Counts occupancy from here on."""
        self.trained_tokens = self._computed = 0

    # --- training ---------------------------------------------------------------------------------------------------

    def advance(self, pause: Callable[[], bool]) -> list[int]:
        """Trains all trials short of their targets until one arrives, or `pause()` is true after a micro-step.

        Returns the trials that stand at their targets. Raises TrialFailed for one that can't go on. See Engine.
        """
        training = [live for live in self._trials.values() if not live.arrived]
        with self._at_work():
            # In eval mode, as loaded: the base's own dropout, where it has any, would draw from one generator for all.
            while training and not self._failures and not any(live.arrived for live in training):
                self._micro_step(training)
                if pause():
                    break
        # Of those that stood before, all is known.
        self._settle(0 if any(live.arrived for live in training) else _REPORTS_AHEAD)
        self._raise_failure()
        return [number for number, live in self._trials.items() if live.arrived]

    def finish(self) -> None:
        """Waits until all optimizer steps that were taken are done. Raises TrialFailed as `advance` does."""
        self._settle(0)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failures:
            failure = self._failures.pop(0)
            if failure.trial in self._trials:
                self.drop(failure.trial)
            raise failure

    def _micro_step(self, training: list[Live]) -> None:
        """Runs one stream, and the optimizer step of every trial whose batch it completes."""
        for live in training:
            if live.batch is None:
                rows = live.batches[live.step]
                live.batch = Batch(rows.tolist(), self.train.lengths[rows].tolist())
        parts = self._parts(training)
        message: str | None = None
        try:
            self._gradients(parts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
        if message is not None:
            # Outside the except block, whose traceback would keep the tensors of the failed step alive.
            self._halve(training, parts, message)
            return
        complete = [live for live in training if live.batch is not None and live.batch.empty]
        if complete:
            self._step(complete)
        self._settle(_REPORTS_AHEAD)

    def _parts(self, training: list[Live]) -> list[Part]:
        if self._runner.shared:
            order = packing.turns(training)
            taken = packing.share([self._batch(live) for live in order], self.micro_tokens)
            taking = [(live, rows) for live, rows in zip(order, taken, strict=True) if rows]
        else:
            taking = [(live, self._batch(live).take(self.micro_tokens)) for live in training]
        parts = []
        for live, places in sorted(taking, key=lambda pair: pair[0].index):
            batch = self._batch(live)
            completion = int(self.train.completions[batch.rows].sum())
            seed = derive_seed(live.config.seed, DROPOUT, live.step) if live.config.dropout else 0
            rows = [batch.rows[place] for place in places]
            parts.append(Part(live.index, live.slot, rows, places, seed, 1 / completion))
        return parts

    @staticmethod
    def _batch(live: Live) -> Batch:
        assert live.batch is not None
        return live.batch

    def _gradients(self, parts: list[Part]) -> None:
        """Adds the parts' gradients to their slots, and their losses to the slots' sums."""
        stream, targets = self._runner.load(self.train, parts)
        hidden = self._runner.forward(stream)
        sums, slope = score(hidden, self.base.head.weight, targets, self.slots + 1, True)
        assert slope is not None
        self._runner.backward(stream, slope)
        self._sums += sums
        self.trained_tokens += stream.tokens
        self._computed += stream.ids.shape[1]

    def _halve(self, training: list[Live], parts: list[Part], message: str) -> None:
        """After a lack of memory: smaller streams from here on, and the batches that were in this one from their start.

        A stream that can't be smaller fails the trial whose example is the longest. Such a stream is of one example, or
        of one of each trial where each has a room of its own.
        """
        self._runner.recover()
        touched = {part.index for part in parts}
        for live in training:
            if live.index in touched:
                live.batch = None
                live.slot.gradient.zero_()
                self._sums[live.index].zero_()
        if all(len(part.rows) == 1 for part in parts) and (len(parts) == 1 or not self._runner.shared):
            longest = max(parts, key=lambda part: int(self.train.lengths[part.rows[0]]))
            failed = next(live for live in training if live.index == longest.index)
            text = f"step {failed.step + 1}: {message}"
            self._failures.append(TrialFailed(failed.config.number, "out_of_memory", text))
        else:
            tokens = sum(int(self.train.lengths[row]) for part in parts for row in part.rows)
            self.micro_tokens = max(1, min(self.micro_tokens, tokens) // 2)

    @torch.no_grad()
    def _step(self, complete: list[Live]) -> None:
        """The optimizer steps of trials whose batches are complete; nothing here waits for a GPU."""
        rates = [rate(live.config, live.step, len(live.batches)) for live in complete]
        norms = self._runner.step([live.slot for live in complete], rates)
        sums = [self._sums_of[live.index] for live in complete]
        figures = torch.stack((torch.stack(sums), norms.double()), dim=1)
        torch._foreach_zero_(sums)
        for live in complete:
            live.step += 1
            live.tokens += sum(self._batch(live).lengths)
            live.batch = None
        arrived = None
        if figures.is_cuda:
            figures = figures.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._reports.append(Report([(live, live.step) for live in complete], figures, arrived))

    def _settle(self, ahead: int) -> None:
        """Reads the figures of all but the last `ahead` reports, and judges the trials by them."""
        while len(self._reports) > ahead:
            report = self._reports.popleft()
            if report.arrived is not None:
                report.arrived.synchronize()
            for (live, step), (loss, norm) in zip(report.steps, report.figures.tolist(), strict=True):
                number = live.config.number
                if self._trials.get(number) is not live or any(f.trial == number for f in self._failures):
                    continue
                live.losses.append(loss)
                if (why := live.health.watch(loss, norm)) is not None:
                    self._failures.append(TrialFailed(number, "diverged", f"step {step}: {why}"))

    # --- judging ----------------------------------------------------------------------------------------------------

    def evaluate(self, trial: int | None, rows: int | None) -> Evaluation:
        """Loss on the first `rows` validation rows (None: all) with the trial's weights; None is the base model.

        Raises TrialFailed (the slot is free then) where a trial's loss is not finite or memory runs out.
        """
        count = self.validation.rows if rows is None else min(rows, self.validation.rows)
        return self._judge(trial, "evaluation", lambda live: self._evaluate(live, count), lambda found: found.nll)

    def score(self, trial: int | None, split: Split, rows: Sequence[int]) -> NDArray[np.float64]:
        """Negative log-likelihood (nats) of each row's completion, float64 [rows], with the trial's weights.

        None is the base model. Raises TrialFailed as `evaluate` does.
        """
        return self._judge(trial, "scoring", lambda live: self._score(live, split, rows), lambda found: found.sum())

    def generate(
        self, trial: int | None, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, ends: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy continuations of prompts (token ids), each up to an end token, which is left out: see Engine.

        By the model as transformers has it, with the trial's adapter added behind its linear layers. Raises TrialFailed
        as `evaluate` does.
        """

        def run(live: Live | None) -> list[list[int]]:
            with adapted(live.slot) if live is not None else nullcontext():
                return greedy(self.base.model, self.base.tokenizer, prompts, max_new_tokens, self.micro_tokens, ends)

        return self._judge(trial, "generation", run, lambda _: 0.0)

    def _judge(self, trial: int | None, what: str, run: Callable[[Live | None], T], loss: Callable[[T], float]) -> T:
        """Runs what judges a trial or the base model. Raises TrialFailed, which frees the slot."""
        failure: tuple[FailureCode, str] | None = None
        try:
            result = run(None if trial is None else self._of(trial))
        except RuntimeError as error:
            if trial is None or not is_out_of_memory(error):
                raise
            failure = ("out_of_memory", f"{what}: {str(error).splitlines()[0]}")
        if failure is None and trial is not None and not math.isfinite(loss(result)):
            failure = ("diverged", f"{what}: loss {loss(result):g}")
        if failure is not None and trial is not None:
            self._runner.recover()
            self.drop(trial)
            raise TrialFailed(trial, *failure)
        return result

    @torch.no_grad()
    def _evaluate(self, live: Live | None, count: int) -> Evaluation:
        def nll(part: list[int]) -> torch.Tensor:
            return self._nll(self.validation, self._part(live, part))

        with self._at_work():
            return evaluation(self.validation, self.rung_rows, count, self.micro_tokens, nll)

    @torch.no_grad()
    def _score(self, live: Live | None, split: Split, rows: Sequence[int]) -> NDArray[np.float64]:
        if not len(rows):
            return np.zeros(0)
        self._runner.reach(int(split.lengths[list(rows)].max()))
        with self._at_work():
            sums = [
                self._each_nll(split, self._part(live, part)) for part in cut(rows, split.lengths, self.micro_tokens)
            ]
        return torch.cat(sums).cpu().numpy()

    def _part(self, live: Live | None, rows: list[int]) -> Part:
        index, slot = (self.slots, None) if live is None else (live.index, live.slot)
        return Part(index, slot, rows, rows, 0, 1.0)

    def _nll(self, split: Split, part: Part, rounded: bool = False) -> torch.Tensor:
        """The loss of one part (fp64 scalar), without dropout, by the base's whole weights or by the rounded ones."""
        stream, targets = self._runner.load(split, [part])
        stream.dropout, stream.rounded = False, rounded
        hidden = self._runner.forward(stream, training=False)
        return score(hidden, self.base.head.weight, targets, self.slots + 1, False)[0][part.index]

    def _each_nll(self, split: Split, part: Part) -> torch.Tensor:
        """The loss of each row of one part (fp64 [rows]), without dropout."""
        stream, targets = self._runner.load(split, [part])
        stream.dropout = stream.rounded = False
        hidden = self._runner.forward(stream, training=False)
        # To the head every row is a slot of its own; what pads the targets counts as one more.
        count = len(part.rows)
        scored = torch.from_numpy(split.completions[part.rows])
        owners = torch.full_like(targets.owners, count)
        owners[: int(scored.sum())] = torch.repeat_interleave(torch.arange(count), scored).to(owners.device)
        return score(hidden, self.base.head.weight, replace(targets, owners=owners), count + 1, False)[0][:count]

    # --- leaving ----------------------------------------------------------------------------------------------------

    def checkpoint(self, trial: int, folder: Path) -> None:
        """Writes the trial whole into `folder`, or nothing. Raises OSError.

        A batch that is under way is not in it: a restored trial begins that step again.
        """
        self._take_down(self._of(trial), still=True)(folder)

    def snapshot(self, trial: int, *, still: bool) -> Callable[[Path], None] | None:
        """What writes the trial as it is now, from any thread, while others train on. None: there are no others."""
        return self._take_down(self._of(trial), still=still) if self.slots > 1 else None

    def _take_down(self, live: Live, *, still: bool) -> Callable[[Path], None]:
        state = State(live.config, live.step, live.tokens, self.train.rows)
        taken = adapter_files.Buffers.of(live.slot, still=still)
        endings = self._endings(live.config.targets)

        def write(folder: Path) -> None:
            if holds(folder, state):
                # A trial that repeats a stretch after a crash arrives at checkpoints that are there already.
                return
            buffers = taken.on_host()
            with write_folder(folder) as temporary:
                adapter_files.write_adapter(temporary, live.slot, self.base.name, endings, buffers)
                adapter_files.write_state_of(temporary, live.slot, buffers)
                write_state(temporary, state)

        return write

    def _endings(self, targets: Targets | None) -> list[str]:
        """The name endings of targeted modules, found once: that looks at every pair of the model's modules."""
        assert targets is not None
        if targets not in self._known_endings:
            self._known_endings[targets] = target_modules(self.base.model, targets)
        return self._known_endings[targets]

    def drop(self, trial: int) -> None:
        """Frees the slot. The base model is as it was, to the bit."""
        live = self._of(trial)
        del self._trials[trial]
        self._failures = [failure for failure in self._failures if failure.trial != trial]
        self._sums[live.index].zero_()
        self._runner.seat(live.index, None)
        self.base.busy = bool(self._trials)

    def kept(self) -> Kept:
        """What `rest` would give back: the graphs of streams."""
        return self._runner.kept

    def rest(self) -> None:
        """Gives the graphs back. Streams are captured again as they come."""
        self._runner.recover()

    def _of(self, trial: int) -> Live:
        if trial not in self._trials:
            raise KeyError(f"trial {trial} is in no slot of this engine")
        return self._trials[trial]
