"""Runs full-parameter engines through scripts of calls, as workers would: `full_driver.py SCRIPTS.json`.

In a process of its own, since it makes process groups. A script is an object with `job` (fields of WorkerJob), `bf16`
and `calls`, a list of lists: a name and its arguments. What its calls gave is printed as one line of JSON. Where `oom`
names a file, the other processes run out of memory in their third step, once: the file says that it has happened. With
`compiled` the first process's layers are compiled as on a GPU, but for what makes them faster.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainers.engine import TrialFailed
from trainers.full import distributed
from trainers.full.engine import FullEngine
from trainers.messages import TrialConfig, WorkerJob
from trainers.models import load_base
from trainers.splits import load_split

FAILING = """
import sys
from pathlib import Path
import torch
from trainers.full import distributed
from trainers.full.replica import Replica
real, steps = Replica.step, []
def step(self, *given):
    steps.append(1)
    if len(steps) == 3 and not Path({mark!r}).exists():
        Path({mark!r}).touch()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return real(self, *given)
Replica.step = step
sys.exit(distributed.main())
"""


def engine_of(script: dict[str, Any]) -> FullEngine:
    """The engine, as load_engines makes it, or over a bf16 model."""
    empty = {"worker": "w", "command": [], "boot_id": ""}
    times = {"origin_boot_ms": 0, "fence": 0, "paid_ms": 0, "work_ms": 0, "checkpoint_ms": 0, "rung_rows": 5}
    job = WorkerJob(**empty, **times, device="cpu", threads=1, methods=["full"], **script["job"])
    torch.set_num_threads(1)
    base = load_base(job.model, job.device)
    if script.get("bf16"):
        base.model.to(torch.bfloat16)
    train, validation = (load_split(Path(job.data), name) for name in ("train", "validation"))
    return FullEngine(base, train, validation, job.rung_rows, job=job)


def train(engine: FullEngine, trial: int, steps: int) -> list[float]:
    """The loss of each of the next steps."""
    losses = []
    for _ in range(steps):
        engine.advance(lambda: True)
        losses.append(engine.train_loss(trial))
    return losses


def held(engine: FullEngine) -> list[int]:
    """How many shards live in this process, and how many whole weights of a sharded model that nobody wants."""
    shards = [one for one in gc.get_objects() if type(one) is DTensor and isinstance(one, torch.nn.Parameter)]
    known = {id(one) for one in engine.base.model.parameters()}
    known |= {id(one) for one in engine._trained._replica.weights.masters.values()}  # type: ignore[union-attr]
    whole = [one for one in gc.get_objects() if type(one) is torch.nn.Parameter and not one.is_meta]
    return [len(shards), sum(id(one) not in known for one in whole)]


def kept(engine: FullEngine, trial: int) -> int:
    """How many numbers the next step's forward keeps for backward, but for those that are computed again."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train(engine, trial, 1)
    return sum(sizes)


def compiled(engine: FullEngine) -> None:
    """Has the first process's layers compiled, on the CPU too."""
    warnings.simplefilter("ignore")  # torch's tracer looks at every attribute of a tensor, some of which warn
    torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]
    engine._trained._replica.weights._compiling = True  # type: ignore[union-attr]


def call(engine: FullEngine, name: str, *given: Any) -> Any:
    """One call of the script."""
    rows = [engine.validation[row].ids for row in range(3)]
    match name:
        case "admit":
            config, checkpoint = given
            return engine.admit(TrialConfig(**config), checkpoint and Path(checkpoint), None).step
        case "train":
            return train(engine, *given)
        case "micro":
            engine.micro_tokens = given[0]
            return None
        case "evaluate":
            return [engine.evaluate(trial, None).nll for trial in given]
        case "score":
            return [engine.score(trial, engine.validation, [3, 1, 2]).tolist() for trial in given]
        case "generate":
            return [
                engine.generate(trial, [row[:n] for row, n in zip(rows, (5, 3, 4), strict=True)], 6) for trial in given
            ]
        case "checkpoint":
            trial, folder = given
            return engine.checkpoint(trial, Path(folder))
        case "drop":
            return engine.drop(*given)
        case "pids":
            group = engine._trained._group  # type: ignore[union-attr]
            return [child.pid for child in group._children]
        case "held":
            return held(engine)
        case "kept":
            return kept(engine, *given)
    raise ValueError(name)


def run(script: dict[str, Any]) -> list[Any]:
    """What the calls of a script gave."""
    usual = distributed.COMMAND
    if "oom" in script:
        distributed.COMMAND = [sys.executable, "-P", "-c", FAILING.format(mark=script["oom"])]
    engine = engine_of(script)
    if script.get("compiled"):
        compiled(engine)
    results = []
    for name, *given in script["calls"]:
        try:
            results.append(call(engine, name, *given))
        except TrialFailed as error:
            results.append({"code": error.code, "message": str(error)})
    if isinstance(engine._trained, distributed.Ensemble):
        engine._trained.end()
    distributed.COMMAND = usual
    return results


if __name__ == "__main__":
    for script in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(script)), flush=True)
