"""What the ranks of a process group send each other, and the time, against the number of ranks: gloo, on a CPU.

linear_kl of a vocabulary that is spread over the ranks, forward + backward; and a step of the trainer with small T5s,
both models replicated (DDP), or both sharded (FSDP2).

Bytes are counted, outside of what is timed, from the arguments of every collective that reaches torch's dispatcher, be
it Python's, DDP's, FSDP's or DTensor's (CommDebugMode counts calls so, but no bytes). "Sent" is what a rank passes to
them, "received" what they pass back. On a network a ring of N ranks sends (N - 1) / N of a tensor that is gathered or
scattered, and twice that of one that is all-reduced. T tokens, V vocabulary. A rank is a process of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.machine import machine, titled
from benchmarks.harness.saved import save
from fastkd import linear_kl
from fastkd.train.flags.arguments import parse
from fastkd.train.models.sharding import shard
from fastkd.train.objectives.methods import METHODS
from fastkd.train.training.trainer import DistillTrainer

HIDDEN, TEACHER_HIDDEN = 256, 512
A_CALL = 104  # bytes that linear_kl sends for a call; for a token, statistics and the gradient of its hidden state
A_TOKEN = {"forward_kl": 56 + 4 * HIDDEN, "jsd": 56 + 24 + 4 * HIDDEN}
SCALARS = 64  # bytes of a training step that are no weights or norms: counts of tokens, whether to stop


class Traffic(TorchDispatchMode):
    """Keeps (collective, bytes sent, bytes received) of every call that this rank makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its own calls come back here
        if function.namespace in ("c10d", "_c10d_functional"):
            self._count(function._schema.name.split("::")[1], args)
        if function.namespace == "fastkd":  # whose calls would run outside of this mode
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs or {})
        return function(*args, **kwargs or {})

    def _count(self, name: str, args: Sequence[Any]) -> None:
        first, *rest = (sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, torch.Tensor)) for arg in args)
        if name in ("allreduce_", "all_reduce"):
            self.calls.append(("all-reduce", first, first))
        elif name in ("allgather_", "_allgather_base_"):
            self.calls.append(("all-gather", rest[0], first))
        elif name == "all_gather_into_tensor":
            self.calls.append(("all-gather", first, first * args[1]))
        elif name == "_reduce_scatter_base_":
            self.calls.append(("reduce-scatter", rest[0], first))
        elif name not in ("barrier", "wait_tensor", "_wrap_tensor_autograd"):
            raise NotImplementedError(f"bytes of {name}")


def vocabulary(rank: int, ranks: int, divergence: str, tokens: int, pieces: int, rounds: int) -> dict:
    """The collectives and the seconds of linear_kl, forward + backward."""
    torch.manual_seed(0)  # hidden states are the same on all ranks
    columns, widths = len(range(rank, pieces, ranks)), (HIDDEN, TEACHER_HIDDEN)
    hidden, teacher_hidden = (torch.randn(tokens, width) for width in widths)
    weight, teacher_weight = (torch.randn(columns, width) / 16 for width in widths)
    student, teacher = (hidden.requires_grad_(), weight.requires_grad_()), (teacher_hidden, teacher_weight)

    def run() -> float:
        if ranks > 1:
            dist.barrier()
        begin = time.perf_counter()
        loss = linear_kl(*student, *teacher, divergence=divergence, vocab_group=dist.group.WORLD)
        torch.autograd.grad(loss, student)
        return time.perf_counter() - begin

    with Traffic() as traffic:
        run()
    return {"calls": traffic.calls, "samples_s": [run() for _ in range(rounds)]}


def t5(width: int, layers: int, pieces: int) -> Any:
    sizes: Any = {"d_model": width, "d_kv": 32, "num_heads": width // 32, "d_ff": 4 * width, "num_layers": layers}
    sizes |= {"vocab_size": pieces, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def closed_form(student: Any, teacher: Any, ranks: int, sharded: bool) -> dict[str, int]:
    """Bytes of a step, of whole tensors: of DDP's gradients, or with FSDP2 of what is gathered and scattered."""
    if not sharded:
        return {"all-reduce": sum(p.nbytes for p in student.parameters())}

    def size(model: Any, part: str = "") -> int:  # padded to as many rows on each rank
        return sum(p.nbytes + -len(p) % ranks * p[0].nbytes for name, p in model.named_parameters() if part in name)

    # A layer is gathered for each pass, what is in no layer once, and the teacher's head once more, for the loss.
    gathered = size(student) + size(student, ".block.") + size(teacher) + size(teacher, "shared.")
    norms = 4 * (2 * len(list(student.parameters())) - 1)  # of gradients: to log, without the embedding's; to clip
    return {"all-reduce": norms, "all-gather": gathered, "reduce-scatter": size(student)}


def training(rank: int, ranks: int, kind: str, quick: bool) -> dict:
    """The collectives of a step of the trainer, what they should move, and the seconds of the steps after it."""
    transformers.logging.set_verbosity_error()
    pieces, steps, sharded = 512 if quick else 8192, 5 if quick else 15, kind == "FSDP2"
    flags = ["--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--eval_strategy", "no", "--logging_steps"]
    flags += ["1000", "--per_device_train_batch_size", "4", "--max_steps", str(steps), "--output_dir", "out"]
    flags += ["--teacher", "given", *(["--fsdp"] if sharded else [])]
    args = parse(flags, needs_data=False)[1]
    student, teacher = (t5(64, 1, pieces), t5(96, 2, pieces)) if quick else (t5(192, 4, pieces), t5(384, 6, pieces))
    expected = closed_form(student, teacher, ranks, sharded) if ranks > 1 else {}
    if sharded:
        shard(teacher, args.device)
    texts: Any = [{"input_ids": row[:64], "labels": row[64:]} for row in torch.randint(3, pieces, (steps * 12, 96))]
    traffic, ends = Traffic(), []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:  # DDP's first step, which sorts gradients into buckets, is over
                traffic.__enter__()
            elif state.global_step == 3:
                traffic.__exit__(None, None, None)
            ends.append(time.perf_counter())

    trainer = DistillTrainer(
        model=student, args=args, method=METHODS["kd"], teacher=teacher, train_dataset=texts, callbacks=[Watch()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return {"calls": traffic.calls, "closed_form": expected, "samples_s": [b - a for a, b in pairwise(ends[2:])]}


def _rank(rank: int, ranks: int, folder: str, task: Callable[..., dict], cases: Sequence[tuple]) -> None:
    os.chdir(folder)
    torch.manual_seed(0)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    Path(f"{rank}.json").write_text(json.dumps([task(rank, ranks, *case) for case in cases]))
    if ranks > 1:
        dist.barrier()


def in_ranks(task: Callable[..., dict], ranks: int, cases: Sequence[tuple]) -> list[dict]:
    """What `task(rank, ranks, *case)` returns: calls, which are alike on all ranks, and each round's slowest time."""
    print(f"{task.__name__}: ranks {ranks}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, folder, task, cases), nprocs=ranks, start_method="fork")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    results = []
    for of_ranks in zip(*found, strict=True):
        assert all(one["calls"] == of_ranks[0]["calls"] for one in of_ranks)
        slowest = [max(times) for times in zip(*(one["samples_s"] for one in of_ranks), strict=True)]
        results.append({"ranks": ranks, **of_ranks[0], "samples_s": slowest, "min_ms": round(min(slowest) * 1e3)})
    return results


def judged(target: str, bound: int, deviations: Sequence[int]) -> dict:
    """A target as the other benchmarks have them, on the largest of some differences in bytes."""
    worst = max(map(abs, deviations))
    return {"target": target, "relation": "<=", "bound": bound, "measured": worst, "met": worst <= bound}


def line(width: int, *cells: Any) -> str:
    return "  ".join(str(cell).rjust(width) for cell in cells)


def measure_vocabulary(quick: bool) -> Iterator[tuple[dict, str]]:
    """Results of linear_kl, and their lines of a table."""
    ranks, rounds = ([2], 1) if quick else ([1, 2, 3, 4], 3)
    sizes = ([16, 40], [500, 1000]) if quick else ([256, 512, 1024], [8192, 32128, 64000])
    cases = list(product(A_TOKEN, *sizes, [rounds]))
    found = ((one, case) for n in ranks for one, case in zip(in_ranks(vocabulary, n, cases), cases, strict=True))
    for one, (name, tokens, pieces, _) in found:
        sent, received = (sum(call[i] for call in one["calls"]) for i in (1, 2))
        share = f"{100 * received / (4 * tokens * pieces):.2f} %"
        cells = (name, one["ranks"], tokens, pieces, len(one["calls"]), sent, received, share, one["min_ms"])
        yield (
            {"divergence": name, "T": tokens, "V": pieces, "sent": sent, "received": received, **one},
            line(10, *cells),
        )


def vocabulary_targets(results: Sequence[dict]) -> list[dict]:
    """Bytes do not depend on V, and are those that vocabulary_shards.py states."""
    targets = []
    for name, a_token in A_TOKEN.items():
        ours = [r for r in results if r["divergence"] == name and r["ranks"] > 1]
        by_v = [r["sent"] - s["sent"] for r in ours for s in ours if (r["ranks"], r["T"]) == (s["ranks"], s["T"])]
        by_formula = [r["sent"] - (A_CALL + a_token * r["T"]) for r in ours]
        targets.append(judged(f"linear_kl {name}: bytes sent, beyond those at another V", 0, by_v))
        targets.append(judged(f"linear_kl {name}: bytes sent, beyond {A_CALL} + {a_token} T", 0, by_formula))
    return targets


def measure_training(quick: bool) -> Iterator[tuple[dict, str]]:
    """Results of training steps, and their lines of a table."""
    several = list(product((2,) if quick else (2, 3), ("DDP", "FSDP2")))
    for n, kind in several if quick else [(1, "alone"), *several]:
        (one,) = in_ranks(training, n, [(kind, quick)])
        lines = [
            line(14, kind, n, collective, len(moved), sum(moved), expected, one["min_ms"])
            for collective, moved, expected in moved_by(one)
        ]
        yield {"kind": kind, **one}, "\n".join(lines)


def moved_by(one: dict) -> list[tuple[str, list[int], int]]:
    """(collective, the bytes of each call, what they should come to)"""
    return [
        (
            collective,
            [max(sent, received) for name, sent, received in one["calls"] if name == collective],
            one["closed_form"].get(collective, 0),
        )
        for collective in ("all-reduce", "all-gather", "reduce-scatter")
    ]


def training_targets(results: Sequence[dict]) -> list[dict]:
    return [
        judged(
            f"training step, {one['kind']}, ranks {one['ranks']}: {collective} bytes, beyond the closed form",
            SCALARS,
            [sum(moved) - expected],
        )
        for one in results
        for collective, moved, expected in moved_by(one)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts, samples and what they were taken on")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # or the ranks fight for the cores
    torch.set_num_threads(1)
    host = machine() | {"cores": os.cpu_count()}
    record: dict[str, Any] = {"machine": host, "device": "cpu", "linear_kl": [], "training": [], "targets": []}

    def keep(name: str, found: Iterator[tuple[dict, str]]) -> None:
        for result, text in found:
            print(text, flush=True)
            record[name].append(result)
            if options.json:
                save(options.json, record)

    print(f"{titled(host, host['cpu'] + ', one thread a rank')}\n")
    print(line(10, "linear_kl", "ranks", "T", "V", "calls", "sent", "received", "of 4 T V", "min ms"))
    keep("linear_kl", measure_vocabulary(options.quick))
    print("\n" + line(14, "training step", "ranks", "collective", "calls", "bytes", "closed form", "min ms"))
    keep("training", measure_training(options.quick))
    record["targets"] = vocabulary_targets(record["linear_kl"]) + training_targets(record["training"])
    if options.json:
        save(options.json, record)
    print()
    for t in record["targets"]:
        print(f"- {t['target']} {t['relation']} {t['bound']}: {t['measured']}, {'met' if t['met'] else 'NOT MET'}")
    print(f"\nAll ranks share the {host['cores']} cores of one machine: their times are no measure of a speed-up.")


if __name__ == "__main__":
    main()
