"""Trials with today's tools, as their documentation teaches: transformers' Trainer over a model with a PEFT adapter.

    python -m benchmarks.hf_trials JOB.json    one of several processes of `benchmarks.packing --mode processes`

Nothing here is slowed down or tuned on purpose. Where a figure is wanted that the Trainer does not give, it is found
without a change to what the Trainer does: the data set notes which rows were fetched, a callback when steps ended. The
Trainer waits for the device in every step (its filter of losses that are not finite), so that a step's end on the host
is its end on the device, but for the optimizer's kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from benchmarks.workload import SHAPES, Measured, Setup, Work, make_setup
from trainers.messages import TrialConfig
from trainers.splits import Split

WARM_STEPS = 10  # of the trial before the measurement: kernels are chosen, the weights are in the page cache
MODULES: dict[str, list[str] | str] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all-linear": "all-linear",
}
_ENDLESS = 1_000_000  # steps of a trial that is stopped from outside
_LOOK_S = 0.01
_GIB = 1 << 30


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """A prepared split as the Trainer takes it; `fetched` are the rows it asked for, in order."""

    def __init__(self, split: Split) -> None:
        self.fetched: list[int] = []
        self._rows = []
        for number in range(split.rows):
            example = split[number]
            ids = example.ids.tolist()
            self._rows.append(
                {
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "labels": np.where(example.mask, example.ids, -100).tolist(),
                }
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        self.fetched.append(row)
        return self._rows[row]

    def work(self, setup: Setup, batch_size: int, first: int, last: int) -> Work:
        """What steps `first` to `last` (counted from 0, without the last) trained. Raises ValueError on odd batches."""
        if len(self) % batch_size:
            raise ValueError(f"{len(self)} rows are no whole number of batches of {batch_size}")
        # One process fetches the rows in order. The loader is a batch ahead of the steps, so only the first ones count.
        batches = np.asarray(self.fetched[first * batch_size : last * batch_size]).reshape(last - first, batch_size)
        lengths = setup.train.lengths[batches]
        return Work(
            steps=last - first,
            tokens=int(lengths.sum()),
            flops=float(setup.flops[batches].sum()),
            computed=int(lengths.max(axis=1, initial=0).sum()) * batch_size,
        )


def quiet() -> None:
    """Turns off what libraries print for people; it would cost no time that counts, but bury the result lines."""
    printing: Any = transformers_logging
    printing.set_verbosity_error()
    printing.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|torch)\b.*")


def load(setup: Setup) -> Any:
    """Loads the base model: bf16 on a GPU, fp32 on the CPU, as trainers.models does."""
    dtype = torch.bfloat16 if setup.device.type == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(setup.folder, dtype=dtype)
    return model.to(setup.device)


@functools.cache
def _tokenizer(folder: Path) -> Any:
    # A search loop needs one for all its trials, to tokenise the data before the first.
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def add_adapter(model: Any, trial: TrialConfig) -> Any:
    """Puts the trial's adapter into the model."""
    assert trial.rank is not None and trial.alpha is not None and trial.targets is not None
    config = LoraConfig(
        r=trial.rank,
        lora_alpha=int(trial.alpha),
        target_modules=MODULES[trial.targets],
        lora_dropout=trial.dropout,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def make_trainer(
    setup: Setup, model: Any, trial: TrialConfig, rows: Rows, output: str, callbacks: list[TrainerCallback]
) -> Trainer:
    """The Trainer of one trial, which lasts `trial.examples`; it neither saves nor logs."""
    on_gpu = setup.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=trial.batch_size,
        max_steps=trial.examples // trial.batch_size,
        learning_rate=trial.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(trial.warmup * (trial.examples // trial.batch_size)),
        weight_decay=trial.weight_decay,
        max_grad_norm=trial.clip_norm,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,  # the default, but on the CPU it only warns
        seed=trial.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(
        _tokenizer(setup.folder)
    )  # pads to the longest of the batch, and labels with -100
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)  # it would print the summary of a trial between the result lines
    return trainer


def now(device: torch.device) -> float:
    """Seconds on a steady clock, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def tidy(device: torch.device) -> None:
    """Gives memory back that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_gib(device: torch.device) -> float | None:
    """The most GPU memory that the allocator held since the last reset, captured graphs' own included."""
    return torch.cuda.max_memory_reserved() / _GIB if device.type == "cuda" else None


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def shortened(trial: TrialConfig, steps: int) -> TrialConfig:
    """The same trial with another number of steps."""
    return dataclasses.replace(trial, examples=steps * trial.batch_size)


def _train(setup: Setup, base: Any, trial: TrialConfig, rows: Rows, output: str) -> Work:
    """Trains a trial to its end over a loaded base model, which is as it was afterwards."""
    rows.fetched.clear()
    model = add_adapter(base, trial)
    trainer = make_trainer(setup, model, trial, rows, output, [])
    steps = int(trainer.train().global_step)
    model.unload()
    # PEFT leaves it behind and would warn of a second adapter in the next trial.
    if hasattr(base, "peft_config"):
        del base.peft_config
    return rows.work(setup, trial.batch_size, 0, steps)


def run_cold(setup: Setup, trials: list[TrialConfig], count: int) -> Measured:
    """`count` trials one after the other, each from the load of its base model on, as a search loop does it.

    A short trial goes before them and is not counted. Neither is the start of the interpreter.
    """
    rows = Rows(setup.train)
    work, seconds, loading = Work(), 0.0, 0.0
    with tempfile.TemporaryDirectory() as output:
        for number, trial in enumerate([shortened(trials[0], WARM_STEPS), *trials[:count]]):
            if number == 1:
                work, seconds, loading = Work(), 0.0, 0.0
                _reset_peak(setup.device)
            start = now(setup.device)
            base = load(setup)
            loading += now(setup.device) - start
            work += _train(setup, base, trial, rows, output)
            del base
            tidy(setup.device)
            seconds += now(setup.device) - start
    extra = {
        "trials": count,
        "steps_a_trial": work.steps // count,
        "load_seconds": round(loading / count, 3),
        "seconds_a_trial": round(seconds / count, 3),
        "ms_a_step_without_load": round(1000 * (seconds - loading) / work.steps, 3),
    }
    return Measured("cold", 1, seconds, work, work.tokens / work.computed, peak_gib(setup.device), extra)


def run_warm(setup: Setup, trials: list[TrialConfig], count: int, at_least_seconds: float) -> Measured:
    """Whole trials one after the other over one loaded base model: `count` of them, and on while time is left."""
    rows = Rows(setup.train)
    base = load(setup)
    with tempfile.TemporaryDirectory() as output:
        _train(setup, base, shortened(trials[0], WARM_STEPS), rows, output)
        _reset_peak(setup.device)
        work, done = Work(), 0
        start = now(setup.device)
        while done < count or now(setup.device) - start < at_least_seconds:
            work += _train(setup, base, trials[done % len(trials)], rows, output)
            done += 1
        seconds = now(setup.device) - start
    memory = peak_gib(setup.device)
    del base
    tidy(setup.device)
    extra = {"trials": done, "steps_a_trial": work.steps // done}
    return Measured("warm", 1, seconds, work, work.tokens / work.computed, memory, extra)


# --- one of several processes ---------------------------------------------------------------------------------------


class _Barrier(TrainerCallback):
    """Waits with the others after some steps, and ends the training when the common window is over.

    `go` holds the window as nanoseconds of CLOCK_MONOTONIC, which is the same for all processes of a machine.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.number = number
        self.parent = os.getppid()
        self.window = (0, 0)
        self.ends: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Notes the time; the Trainer calls it."""
        self.ends.append(time.monotonic_ns())
        if len(self.ends) == WARM_STEPS:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            (self.folder / f"ready-{self.number}").touch()
            while not (self.folder / "go").exists():
                if os.getppid() != self.parent:
                    sys.exit("the benchmark is gone")
                time.sleep(_LOOK_S)
            self.window = tuple(json.loads((self.folder / "go").read_text()))
        elif len(self.ends) > WARM_STEPS and self.ends[-1] > self.window[1]:
            control.should_training_stop = True

    def steps(self) -> tuple[int, int]:
        """The first step that ended inside the window, and the first one after it."""
        start, end = np.searchsorted(self.ends, self.window, side="right")
        return int(start), int(end)


def run_process(job: dict[str, Any]) -> dict[str, Any]:
    """Trains trial `number` of a job until the window is over; returns the work done inside it."""
    device = torch.device(job["device"])
    setup = make_setup(SHAPES[job["shape"]], Path(job["data"]), Path(job["model"]), Path(job["scratch"]), device)
    trial = TrialConfig(**job["trial"])
    rows = Rows(setup.train)
    barrier = _Barrier(Path(job["folder"]), trial.number)
    with tempfile.TemporaryDirectory() as output:
        model = add_adapter(load(setup), trial)
        make_trainer(setup, model, shortened(trial, _ENDLESS), rows, output, [barrier]).train()
    return dataclasses.asdict(rows.work(setup, trial.batch_size, *barrier.steps()))


def main(arguments: list[str]) -> int:
    """Runs one process of several; its result is a file beside its job. Returns the exit code."""
    path = Path(arguments[0])
    job = json.loads(path.read_text())
    quiet()
    try:
        result = run_process(job)
    except torch.OutOfMemoryError as error:
        result = {"failed": "out_of_memory", "said": str(error).splitlines()[0]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.rename(path.with_suffix(".result"))
    return 1 if "failed" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
