"""Full-parameter training, one trial at a time, into transformers folders.

The engine knows how far the trial is, when it has failed and what is written; a `Replica` trains it, or an `Ensemble`
of several, one a process.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from trainers.checkpoints import (
    OPTIMIZER,
    CheckpointError,
    State,
    holds,
    load_tensors,
    read_state,
    save_tensors,
    write_folder,
    write_state,
)
from trainers.engine import Evaluation, Kept, Position, TrialFailed, Warm
from trainers.full import optimizers, weights
from trainers.full.distributed import Ensemble, GroupError
from trainers.full.replica import Options, Replica, Saved
from trainers.health import Health
from trainers.memory import captures
from trainers.messages import FailureCode, TrialConfig, WorkerJob
from trainers.models import Base, one_line
from trainers.named import ModelError
from trainers.splits import Split, batches
from trainers.training import DROPOUT, MICRO_TOKENS, Late, Run, derive_seed, evaluation, is_out_of_memory, rate

T = TypeVar("T")
WARM_ROWS, WARM_STEPS = 16, 3  # in which everything is compiled and captured: the same rows each time
_REPORTS_AHEAD = 2  # steps whose figures may still be on their way from the GPU


class FullEngine:
    """One full-parameter trial; implements `trainers.engine.Engine`.

    The base weights are as they were, to the bit, when the trial has left.
    """

    slots = 1
    method = "full"

    def __init__(
        self,
        base: Base,
        train: Split,
        validation: Split,
        rung_rows: int,
        micro_tokens: int | None = None,
        job: WorkerJob | None = None,
        compiled: bool = True,
    ) -> None:
        """`micro_tokens` go through the model at once in each process; `job` says how trials are trained.

        `compiled` layers are a GPU's alone.

        Raises ModelError: no such optimizer, a loss that is not the model's own, other processes that can't be started.
        """
        self.base = base
        self.train = train
        self.validation = validation
        self.rung_rows = rung_rows
        options = _options(base, micro_tokens, job, compiled)
        optimizers.find(options.optimizer)
        longest = int(max(train.lengths.max(), validation.lengths.max()))
        self._own = weights.Resident(base, fixed=options.graphs)
        self._alone = Replica(self._own, train, longest, options)
        self._alone.verify()
        if not self._alone.padding_free:  # streams are what is captured
            self._without_graphs()
        self._trained: Replica | Ensemble = self._alone
        if job is not None and job.processes > 1:
            self._trained = Ensemble(job, self._own.pristine, self._alone, options)
        self._run: Run | None = None
        self._reports: deque[Late] = deque()

    @property
    def micro_tokens(self) -> int:
        """Tokens that go through the model at once, in each process."""
        return self._trained.micro_tokens

    @micro_tokens.setter
    def micro_tokens(self, tokens: int) -> None:
        self._trained.micro_tokens = self._alone.micro_tokens = tokens

    def warm_up(self) -> None:
        """Runs what is compiled and captured once, so that no trial pays for it, and no forecast takes it for the usual
        speed.

        The engine is as fresh as before, also where there is no memory for a trial. A model whose steps can't be
        captured trains without graphs, and worker.log says so.
        """
        stream = torch.cuda.current_stream() if self._alone.graphs else None
        try:
            self._warm()
        except RuntimeError as error:
            if stream is None:
                raise
            sys.stderr.write(f"{self.base.name}: trains without CUDA graphs: {one_line(error)}\n")
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own
            self._release()
            self._without_graphs()
            self._warm()

    def _without_graphs(self) -> None:
        self._own.without_graphs()
        self._alone.without_graphs()

    def _warm(self) -> None:
        count = min(self.train.rows, WARM_ROWS)
        config = TrialConfig(number=0, method="full", learning_rate=0.0, batch_size=count, examples=count, seed=0)
        try:
            self.admit(config, None, None)
            rows = self._of(0).batches[0].tolist()
            for _ in range(WARM_STEPS):
                self._attempt(0, "warm-up", lambda: self._trained.step(rows, 0, 0.0, config.clip_norm))
            self.evaluate(0, 1)
            self.drop(0)
        except (TrialFailed, GroupError):
            if self.base.busy:
                self._release()
        self.evaluate(None, 1)  # weights that are not trained are compiled apart

    # --- coming and going -------------------------------------------------------------------------------------------

    @property
    def warm(self) -> Warm:
        """See Engine."""
        return self._alone.warm

    def prepare(self, config: TrialConfig, checkpoint: Path | None) -> Callable[[], None] | None:
        """Nothing: there is nobody to train meanwhile."""
        return None

    def admit(self, config: TrialConfig, checkpoint: Path | None, until_tokens: int | None) -> Position:
        """Puts the trial in the slot. Raises TrialFailed; RuntimeError where the slot or the base model is taken."""
        if self.base.busy:
            raise RuntimeError(f"trial {config.number} has no free slot")
        if config.method != self.method:
            raise RuntimeError(f"trial {config.number} is of method {config.method}, this engine of {self.method}")
        self.base.busy = True
        failure: tuple[FailureCode, str] | None = None
        try:
            self._run = self._build(config, checkpoint)
        except (CheckpointError, ModelError, OSError, SafetensorError, ValueError) as error:
            failure = "error", str(error)
        except RuntimeError as error:
            failure = "out_of_memory" if is_out_of_memory(error) else "error", str(error).splitlines()[0]
        if failure is not None or self._run is None:
            self._release(out_of_memory=failure is not None and failure[0] == "out_of_memory")
            raise TrialFailed(config.number, *(failure or ("error", "no trial was built")))
        self._run.until_tokens = until_tokens
        return self._run.position

    def _build(self, config: TrialConfig, checkpoint: Path | None) -> Run:
        if config.examples < 1 or config.batch_size < 1:
            raise ValueError(f"examples {config.examples} and batch_size {config.batch_size} must be at least 1")
        rows = self.train.rows
        state, saved = State(config, 0, 0, rows), None
        if checkpoint is not None:
            state = read_state(checkpoint, config, rows)
            if state.step < len(batches(config, rows)):
                moments = load_tensors(checkpoint / OPTIMIZER)
                saved = Saved(state.step, weights.read(checkpoint), moments, str(checkpoint / OPTIMIZER))
            else:
                saved = Saved(0, weights.read(checkpoint), {})
        self._trained.open(config, saved)
        plan = batches(config, rows)
        health = Health(len(plan), resumed=state.step > 0)
        return Run(config=config, batches=plan, health=health, step=state.step, tokens=state.tokens)

    def target(self, trial: int, until_tokens: int | None) -> None:
        """Sets where the trial stands still next; None is its end."""
        self._of(trial).until_tokens = until_tokens

    def position(self, trial: int) -> Position:
        """Where the trial stands."""
        return self._of(trial).position

    def train_loss(self, trial: int) -> float:
        """Mean training loss (nats a completion token) over the steps since the last call; nan if there were none."""
        return self._of(trial).take_loss()

    def occupancy(self) -> float:
        """Real tokens over tokens computed: examples lie end to end."""
        return 1.0

    # --- training ---------------------------------------------------------------------------------------------------

    def advance(self, pause: Callable[[], bool]) -> list[int]:
        """Trains until the trial arrives at its target or `pause()` is true after a step.

        Returns the trial if it stands at its target. Raises TrialFailed; the slot is free then.
        """
        run = self._run
        if run is None:
            return []
        while not run.arrived:
            self._step(run)
            if pause():
                break
        self._settle(run, 0)
        return [run.config.number] if run.arrived else []

    def finish(self) -> None:
        """Nothing: `advance` waits for all its steps."""

    def _step(self, run: Run) -> None:
        """One optimizer step. A lack of memory ends the trial instead."""
        config, step = run.config, run.step
        rows = run.batches[step].tolist()
        seed, now = derive_seed(config.seed, DROPOUT, step), rate(config, step, len(run.batches))
        figures = self._attempt(
            config.number, f"step {step + 1}", lambda: self._trained.step(rows, seed, now, config.clip_norm)
        )
        run.step += 1
        run.tokens += int(self.train.lengths[rows].sum())
        self._reports.append(Late(figures))
        self._settle(run, _REPORTS_AHEAD)

    def _settle(self, run: Run, ahead: int) -> None:
        """Reads the figures of all but the last `ahead` steps. Raises TrialFailed where they say that it is lost."""
        while len(self._reports) > ahead:
            step = run.step - len(self._reports) + 1
            loss, norm = self._reports.popleft().read()
            self._attempt(run.config.number, f"step {step}", self._trained.check)
            run.losses.append(loss)
            if (why := run.health.watch(loss, norm)) is not None:
                self._release()
                raise TrialFailed(run.config.number, "diverged", f"step {step}: {why}")

    def _attempt(self, trial: int | None, doing: str, call: Callable[[], T]) -> T:
        """What `call` returns. A lack of memory ends the trial: TrialFailed is raised, and the slot is free."""
        try:
            return call()
        except RuntimeError as error:
            if trial is None or not is_out_of_memory(error):
                raise
            message = f"{doing}: {str(error).splitlines()[0]}"
        # Outside the except block, whose traceback would keep the tensors of what failed alive.
        self._release(out_of_memory=True)
        raise TrialFailed(trial, "out_of_memory", message)

    # --- judging ----------------------------------------------------------------------------------------------------

    def evaluate(self, trial: int | None, rows: int | None) -> Evaluation:
        """Loss on the first `rows` validation rows (None: all) with the trial's weights; None is the base model.

        Raises TrialFailed (the slot is free then) where a trial's loss is not finite or memory runs out.
        """
        count = self.validation.rows if rows is None else min(rows, self.validation.rows)
        with self._judging(trial) as replica:
            room = replica.micro_tokens * replica.ranks

            def nll(part: list[int]) -> torch.Tensor:
                return replica.losses(self.validation, part).sum()

            result = self._attempt(
                trial, "evaluation", lambda: evaluation(self.validation, self.rung_rows, count, room, nll)
            )
        self._check_finite(trial, "evaluation", result.nll)
        return result

    def score(self, trial: int | None, split: Split, rows: Sequence[int]) -> NDArray[np.float64]:
        """Negative log-likelihood (nats) of each row's completion, float64 [rows], with the trial's weights.

        None is the base model. Raises TrialFailed as `evaluate` does.
        """
        with self._judging(trial) as replica:
            found: NDArray[np.float64] = self._attempt(
                trial, "scores", lambda: replica.losses(split, rows).cpu().numpy()
            )
        self._check_finite(trial, "scores", float(found.sum()))
        return found

    def generate(
        self, trial: int | None, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, ends: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy continuations of prompts (token ids), each up to an end token, which is left out: see Engine.

        Raises TrialFailed as `evaluate` does.
        """
        with self._judging(trial) as replica:
            return self._attempt(trial, "generation", lambda: replica.generate(prompts, max_new_tokens, ends))

    @contextmanager
    def _judging(self, trial: int | None) -> Iterator[Replica | Ensemble]:
        """What runs the model with the trial's weights, or with the base weights, for the time of the context."""
        if trial is None:
            with self._trained.without_trial():
                yield self._alone
        else:
            self._of(trial)
            yield self._trained

    def _check_finite(self, trial: int | None, doing: str, nll: float) -> None:
        if trial is not None and not math.isfinite(nll):
            self._release()
            raise TrialFailed(trial, "diverged", f"{doing}: loss {nll:g}")

    # --- leaving ----------------------------------------------------------------------------------------------------

    def checkpoint(self, trial: int, folder: Path) -> None:
        """Writes the trial whole into `folder`, or nothing; of one at its end the model alone. Raises OSError."""
        run = self._of(trial)
        state = State(run.config, run.step, run.tokens, self.train.rows)
        if holds(folder, state):
            # A trial that repeats a stretch after a crash arrives at checkpoints that are there already.
            return
        goes_on = not run.position.done
        masters, moments = self._trained.gather(moments=goes_on)
        dtype = self.base.model.dtype
        with write_folder(folder) as temporary:
            rounded = {name: master.detach().to(dtype) for name, master in masters.items()}
            self.base.model.save_pretrained(temporary, state_dict=rounded)
            self.base.tokenizer.save_pretrained(temporary)
            if goes_on and any(rounded[name].dtype != master.dtype for name, master in masters.items()):
                save_tensors(temporary / weights.MASTERS, masters)
            if goes_on:
                save_tensors(temporary / OPTIMIZER, moments)
            write_state(temporary, state)

    def snapshot(self, trial: int, *, still: bool) -> Callable[[Path], None] | None:
        """None: nobody else trains while its only trial is written."""
        self._of(trial)
        return None

    def drop(self, trial: int) -> None:
        """Frees the slot. The base model is as it was, to the bit."""
        self._of(trial)
        self._release()

    def _release(self, *, out_of_memory: bool = False) -> None:
        self._run = None
        self._reports.clear()
        self._trained.close()
        if out_of_memory:  # the next trial shall not fail for what this one left
            self._alone.rest()
        self.base.busy = False
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _of(self, trial: int) -> Run:
        if self._run is None or self._run.config.number != trial:
            raise KeyError(f"trial {trial} is in no slot of this engine")
        return self._run

    def kept(self) -> Kept:
        """What `rest` would give back."""
        return self._alone.kept()

    def rest(self) -> None:
        """Gives back graphs and gradients; both are made again with the next trial."""
        self._alone.rest()


def _options(base: Base, micro_tokens: int | None, job: WorkerJob | None, compiled: bool) -> Options:
    """How trials are trained: as the job says, from graphs where a GPU's time goes into launching."""
    wanted = micro_tokens or (None if job is None else job.full_tokens)
    options = Options(wanted or MICRO_TOKENS[base.device.type], compiled=compiled)
    processes = 1
    if job is not None:
        options = replace(options, optimizer=job.optimizer, checkpointing=job.checkpointing, gathered=job.full_gathered)
        processes = job.processes
    # Graphs draw a model's own dropout otherwise than steps that are not captured yet.
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in base.model.modules())
    drops |= bool(getattr(base.model.config.get_text_config(), "attention_dropout", 0))
    small = captures(base.model.num_parameters(), checkpointing=options.checkpointing, processes=processes)
    return replace(options, graphs=base.device.type == "cuda" and compiled and small and not drops)
