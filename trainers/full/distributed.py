"""Several processes that train a full-parameter trial together, one a GPU: `Ensemble` leads, `python -m` this follows.

    worker = process 0 ── a line of JSON a call ──> process 1 … n - 1   (their stdin)
           <── a word when one is ready, or fails ──                    (their stdout)
           ══ weights, gradients and sums: gloo or NCCL over localhost ══

Processes 1 to n - 1 are children of the worker, in its process group: what ends the worker ends them, and the end of
their stdin does too. They do what process 0 does, call by call. One that dies ends the trial, or the worker: nobody
waits for it in a collective.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from trainers import processes
from trainers.checkpoints import MOMENTS, CheckpointError
from trainers.full.replica import Options, Replica, Saved
from trainers.full.sharded import Sharded
from trainers.full.weights import Pristine, check
from trainers.messages import FailureCode, TrialConfig, WorkerJob
from trainers.models import Base, load_config, load_tokenizer, one_line, resolve
from trainers.named import ModelError
from trainers.splits import Split, load_split
from trainers.training import is_out_of_memory

T = TypeVar("T")
COLLECTIVE_S = 300.0  # that a collective may take: the slowest waits for a compilation elsewhere
NOTICE_S = 5.0  # in which the worker must have noticed that another process died
COMMAND = [sys.executable, "-P", "-m", "trainers.full.distributed"]
_LOOK_S = 10.0  # how long a failed collective waits to hear whose failure it was


class GroupError(Exception):
    """A process of the group ended, or can't be spoken to. One line."""


def _join(rank: int, ranks: int, store: distributed.Store, device: torch.device) -> None:
    """Makes the process group. Everybody is on this machine, so the loopback interface is the way."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    limit = timedelta(seconds=COLLECTIVE_S)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)


def _device_of(base: torch.device, rank: int) -> torch.device:
    """The device of a process. Raises ModelError where there are too few GPUs."""
    if base.type == "cpu":
        return base
    index = (base.index or 0) + rank
    if index >= torch.cuda.device_count():
        raise ModelError(f"processes: {rank + 1} GPUs are wanted, this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)


class Group:
    """The other processes, from start to end. `failure` says why the first of them to die did."""

    def __init__(self, base: Base, settings: dict[str, Any], ranks: int) -> None:
        """Starts them and makes the process group. Raises GroupError, and ModelError where one can't load the model."""
        self.ranks = ranks
        self.in_use = False  # a trial is in: without all processes it can't go on
        self.failure: tuple[FailureCode, str] | None = None
        self._failed = threading.Event()
        self._noticed = threading.Event()
        self._ended = False
        self._ready = threading.Semaphore(0)
        devices = [_device_of(base.device, rank) for rank in range(ranks)]
        limit = timedelta(seconds=COLLECTIVE_S)
        store = distributed.TCPStore("127.0.0.1", 0, ranks, is_master=True, timeout=limit, wait_for_workers=False)
        self._nccl = base.device.type == "cuda"
        self._children: list[subprocess.Popen[bytes]] = []
        for rank in range(1, ranks):
            self._start({**settings, "rank": rank, "ranks": ranks, "port": store.port, "device": str(devices[rank])})
        for _ in self._children:
            self._ready.acquire()
        if self.failure is not None:
            self.end()
            raise (ModelError if self.failure[0] == "error" else GroupError)(self.failure[1])
        self.in_use = True  # nobody may be missing here either
        _join(0, ranks, store, devices[0])
        self.in_use = False

    def _start(self, settings: dict[str, Any]) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        child = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A child looks whether its parent is still the one that started it.
            env={**os.environ, "PYTHONPATH": path, processes.WATCHDOG_PID: str(os.getpid())},
        )
        self._children.append(child)
        with suppress(OSError):  # it has ended, and is heard of below
            _write(child, settings)
        threading.Thread(target=self._listen, args=(child, settings["rank"]), daemon=True).start()

    def _listen(self, child: subprocess.Popen[bytes], rank: int) -> None:
        """Hears what a process says until it ends, and sees to it that its end is noticed."""
        said: tuple[FailureCode, str] | None = None
        assert child.stdout is not None
        with child.stdout as words:
            for line in words:
                word = json.loads(line)
                if "ready" in word:
                    self._ready.release()
                else:
                    said = word["code"], word["message"]
                    self._fail(said)
        status = child.wait()
        if self._ended:
            return
        how = f"killed by signal {-status}" if status < 0 else f"exit code {status}"
        lone = f"process {rank} of {self.ranks} ended: {how}; its last words are in worker.log"
        self._fail(said or ("error", lone))
        self._ready.release()
        if not self.in_use:
            return
        if self._nccl:
            with suppress(Exception):  # kernels that wait for the dead end with their communicator
                distributed.distributed_c10d._abort_process_group()
        if not self._noticed.wait(NOTICE_S):
            os.write(2, f"{lone}; this one can't go on\n".encode())
            os._exit(1)

    def _fail(self, failure: tuple[FailureCode, str]) -> None:
        # Where one ran out of memory, the others' connections break a moment later, or are heard of before.
        if self.failure is None or failure[0] == "out_of_memory":
            self.failure = failure
        self._failed.set()

    def tell(self, call: str, **arguments: Any) -> None:
        """Has the others make a call. Raises GroupError where one of them is gone."""
        try:
            for child in self._children:
                _write(child, {"call": call, **arguments})
        except OSError as error:
            raise GroupError(f"a process of the group can't be spoken to: {error}") from error

    def why(self, error: Exception) -> tuple[FailureCode, str] | None:
        """Whose failure a failed call was: another process's, or None. Takes a moment to find out."""
        self._noticed.set()
        if not (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            self._failed.wait(_LOOK_S)
        return self.failure

    def end(self) -> None:
        """Ends the others and the process group, whatever state they are in."""
        self._ended = True
        self._noticed.set()
        for child in self._children:
            child.kill()
            child.wait()
            assert child.stdin is not None
            with suppress(OSError):
                child.stdin.close()
        if distributed.is_initialized():
            if self._nccl:
                with suppress(Exception):
                    distributed.distributed_c10d._abort_process_group()
            with suppress(Exception):
                distributed.destroy_process_group()


def _write(child: subprocess.Popen[bytes], words: dict[str, Any]) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(words).encode() + b"\n")
    child.stdin.flush()


class Ensemble:
    """Has several processes do what a `Replica` does, of which one is here; has its methods."""

    def __init__(self, job: WorkerJob, pristine: Pristine, alone: Replica, options: Options) -> None:
        """Starts the others. `alone` runs the base model. Raises ModelError, GroupError."""
        if options.optimizer != "adamw":
            raise ModelError(f"optimizer {options.optimizer}: trains in one process; use adamw, or processes: 1")
        base = alone.base
        self.ranks = job.processes
        self._base = base
        self._pristine = pristine
        parameters = [name for name, _ in base.model.named_parameters()]
        self._settings = {
            "parameters": parameters,
            "model": base.name,
            "data": job.data,
            "threads": job.threads,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "options": asdict(options),
            "padding_free": alone.padding_free,
            "longest": alone.longest,
        }
        config = load_config(resolve(base.name))
        device = _device_of(base.device, 0)
        kind = base.model.dtype
        sharded = Sharded(base.name, config, base.tokenizer, kind, device, options, parameters, (base, pristine))
        self._replica = Replica(sharded, alone.train, alone.longest, options)
        self._replica.padding_free = alone.padding_free
        self._replica.rank, self._replica.ranks = 0, job.processes
        self._group: Group | None = Group(base, self._settings, job.processes)

    @property
    def micro_tokens(self) -> int:
        """Tokens that go through the model at once, in each process."""
        return self._replica.micro_tokens

    @micro_tokens.setter
    def micro_tokens(self, tokens: int) -> None:
        self._replica.micro_tokens = tokens

    def _together(self, call: str, here: Callable[[], T], **arguments: Any) -> T:
        """Makes a call in every process. A lack of memory anywhere is raised as one here; then the group is gone."""
        group = self._group
        if group is None:
            raise GroupError("the other processes are gone")
        try:
            group.tell(call, **arguments)
            return here()
        except (RuntimeError, ValueError, GroupError) as error:  # torch raises ValueError where a group was aborted
            failure, known = group.why(error), error
        raise self._gone(group, failure) or known

    def _gone(self, group: Group, failure: tuple[FailureCode, str] | None) -> Exception | None:
        """Ends the group; returns what another process's failure is raised as, None where there was none."""
        self._group = None
        group.end()
        if failure is None:
            return None
        return torch.OutOfMemoryError(failure[1]) if failure[0] == "out_of_memory" else GroupError(failure[1])

    def check(self) -> None:
        """See Replica. What was computed since a process is gone is not to be believed."""
        group = self._group
        if group is not None and group.failure is not None and (error := self._gone(group, group.failure)):
            raise error

    def open(self, config: TrialConfig, saved: Saved | None) -> None:
        """See Replica."""
        kept = self._pristine.keep()
        if saved is not None:
            check(kept, saved.weights)
            moments = {f"{name}.{moment}": kept[name].shape for name in kept for moment in MOMENTS}
            if saved.step and {name: tensor.shape for name, tensor in saved.moments.items()} != moments:
                raise CheckpointError(f"{saved.where}: is of other parameters or another optimizer")
        if self._group is not None and self._group.failure is not None:
            self._group.end()
            self._group = None
        if self._group is None:
            self._group = Group(self._base, self._settings, self.ranks)
        self._group.in_use = True
        step = None if saved is None else saved.step
        given = {"config": asdict(config), "step": step, "micro_tokens": self.micro_tokens}
        self._together("open", lambda: self._replica.open(config, saved), **given)

    def step(self, rows: Sequence[int], seed: int, rate: float, clip_norm: float) -> torch.Tensor:
        """See Replica."""
        given = {"rows": list(rows), "seed": seed, "rate": rate, "clip_norm": clip_norm}
        return self._together("step", lambda: self._replica.step(rows, seed, rate, clip_norm), **given)

    def losses(self, split: Split, rows: Sequence[int]) -> torch.Tensor:
        """See Replica."""
        taken = [split[row] for row in rows]
        part = Split(
            np.concatenate([example.ids for example in taken]),
            np.cumsum([0, *(len(example.ids) for example in taken)]),
            np.concatenate([example.mask for example in taken]),
        )
        given = {"ids": part.ids.tolist(), "offsets": part.offsets.tolist(), "mask": part.mask.tolist()}
        return self._together("losses", lambda: self._replica.losses(part, range(part.rows)), **given)

    def generate(
        self, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """See Replica."""
        listed = [prompt.tolist() for prompt in prompts]
        given = {"prompts": listed, "max_new_tokens": max_new_tokens, "ends": list(ends)}
        return self._together("generate", lambda: self._replica.generate(prompts, max_new_tokens, ends), **given)

    def gather(self, moments: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """See Replica."""
        return self._together("gather", lambda: self._replica.gather(moments), moments=moments)

    @contextmanager
    def without_trial(self) -> Iterator[None]:
        """The base model back in place, beside the trial, for the time of the context."""
        inside = self._group is not None and self._group.in_use
        if inside:
            self._pristine.return_()
        try:
            yield
        finally:
            if inside:
                self._pristine.leave()

    def close(self) -> None:
        """See Replica. What the others can't be told ends with them."""
        group = self._group
        if group is not None and group.in_use:
            group.in_use = False
            try:
                group.tell("close")
            except GroupError:
                self._group = None
                group.end()
        self._replica.close()

    def end(self) -> None:
        """Ends the other processes; a trial that comes later starts new ones."""
        group, self._group = self._group, None
        if group is not None:
            group.end()


# --- the other processes ----------------------------------------------------------------------------------------------


def _prepare(settings: dict[str, Any]) -> Replica:
    """This process's part, without a process group yet. Raises ModelError, DataError."""
    device = torch.device(settings["device"])
    ranks = settings["ranks"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(settings["threads"] or max(1, cores // ranks))
    folder = resolve(settings["model"])
    dtype = getattr(torch, settings["dtype"])
    options = Options(**settings["options"])
    tokenizer = load_tokenizer(folder)
    config, names = load_config(folder), settings["parameters"]
    sharded = Sharded(settings["model"], config, tokenizer, dtype, device, options, names, None)
    replica = Replica(sharded, load_split(Path(settings["data"]), "train"), settings["longest"], options)
    replica.padding_free = settings["padding_free"]
    replica.rank, replica.ranks = settings["rank"], ranks
    return replica


def _obey(replica: Replica, words: dict[str, Any]) -> None:
    match words["call"]:
        case "open":
            replica.micro_tokens = words["micro_tokens"]
            saved = None if words["step"] is None else Saved(words["step"], {}, {})
            replica.open(TrialConfig(**words["config"]), saved)
        case "step":
            replica.step(words["rows"], words["seed"], words["rate"], words["clip_norm"])
        case "losses":
            split = Split(
                np.array(words["ids"], dtype=np.int32),
                np.array(words["offsets"], dtype=np.int64),
                np.array(words["mask"], dtype=np.uint8),
            )
            replica.losses(split, range(split.rows))
        case "generate":
            prompts = [np.array(prompt, dtype=np.int32) for prompt in words["prompts"]]
            replica.generate(prompts, words["max_new_tokens"], words["ends"])
        case "gather":
            replica.gather(words["moments"])
        case "close":
            replica.close()


def _follow(given: IO[bytes], said: int) -> None:
    """Does what process 0 does until it closes the pipe."""
    settings = json.loads(given.readline())
    replica = _prepare(settings)
    os.write(said, b'{"ready": true}\n')
    limit = timedelta(seconds=COLLECTIVE_S)
    store = distributed.TCPStore("127.0.0.1", settings["port"], settings["ranks"], is_master=False, timeout=limit)
    _join(settings["rank"], settings["ranks"], store, torch.device(settings["device"]))
    for line in given:
        _obey(replica, json.loads(line))


def main() -> int:
    """Runs one of the other processes; returns its exit code."""
    processes.die_with_parent()
    # At SIGTERM to the group the worker writes its checkpoints, for which it needs the others.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    said = os.dup(1)
    os.dup2(2, 1)
    try:
        _follow(sys.stdin.buffer, said)
    except Exception as error:
        short = isinstance(error, RuntimeError) and is_out_of_memory(error)
        word = {"code": "out_of_memory" if short else "error", "message": one_line(error)}
        os.write(said, json.dumps(word).encode() + b"\n")
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
