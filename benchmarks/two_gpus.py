"""A training step of LDM4TS on one GPU and on two: python -m benchmarks.two_gpus

Preset guide at 224 px on sp500, as `ldm4ts train` has it on a GPU (bf16, activations recomputed),
but without dropout, whose masks depend on the number of processes. Each way runs in processes of
its own, which it starts; the losses of two GPUs are compared with those of one, step by step.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Subset

from benchmarks.measure import write_rows
from ldm4ts_kernels.batches import EncodedWindows, SeededBatches, load
from ldm4ts_kernels.data import DataConfig, Splits, load_splits
from ldm4ts_kernels.graphs import CudaGraphs, GraphedCall
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.model.placement import kept_on_host
from ldm4ts_kernels.optimizers import build_optimizer
from ldm4ts_kernels.peers import Peers
from ldm4ts_kernels.process import accelerator_of_one_run
from ldm4ts_kernels.runs import TrainConfig
from ldm4ts_kernels.sharding import Replicas, Shards
from ldm4ts_kernels.training import model_fields
from ldm4ts_kernels.training_step import StageLoss, TrainingStep

WAYS = {"one": 1, "DDP": 2, "FSDP2": 2}  # and their processes
BATCHES = (8, 32)  # of all processes together
STEPS, UNTIMED = 40, 8  # of a graph the fourth is recorded
COMPARED = 10  # first steps, before rounding has led the weights apart
WINDOWS = 256  # that are trained on, encoded before
SECONDS = 300  # for all ways; one takes some 50


@dataclass(frozen=True)
class Case:
    """A way on a batch, and on what model of which data."""

    way: str
    batch: int
    config: TrainConfig

    def measure(self, splits: Splits, steps: int, untimed: int) -> dict[str, Any]:
        """Take the steps, in each process, and return what the first one reports."""
        config = self.config
        torch.manual_seed(0)
        with accelerator_of_one_run(config.device, config.precision) as accelerator:
            peers = Peers.of(accelerator)
            model = LDM4TSModel(
                preset=config.preset,
                device=config.device,
                attention_backend=config.attention_backend,
                enable_gradient_checkpointing=config.checkpointing,
                **model_fields(config, splits.series),
            )
            windows = Subset(splits.train, range(min(WINDOWS, len(splits.train))))
            model.freeze_autoencoder(torch.stack([windows[at]["history"] for at in range(16)]))
            batches = SeededBatches(len(windows), self.batch, 0, 0, steps, peers.share)
            encoded = EncodedWindows(windows, model.encode_frozen, chain.from_iterable(batches))
            loss = accelerator.prepare_model(StageLoss(model, "forecaster"), evaluation_mode=True)
            held = (
                Shards(loss, model, peers)
                if self.way == "FSDP2"
                else Replicas(model.trainable_parameters(), peers)
            )
            optimizer = build_optimizer(held.parameters, 1e-4, 1e-2)
            step = TrainingStep(loss.train(), model, held, optimizer, clip=1.0)
            on_gpu = config.device == "cuda"
            graphs = CudaGraphs(model.device) if on_gpu and self.way != "FSDP2" else None
            call = GraphedCall(self.way, step, model.device, graphs)
            with kept_on_host(model, "forecaster"):
                times, losses = _take(call, load(encoded, batches, config.device), on_gpu)
            states = [state for each in optimizer.state.values() for state in each.values()]
            kept = sum(tensor.nbytes for tensor in [*held.parameters, *states])
            found = {
                "graph": call.replay is not None,
                "ms": round(statistics.median(times[untimed:]), 2),
                "peak_mib": _largest(torch.cuda.max_memory_allocated() if on_gpu else 0, peers),
                "kept_mib": _largest(kept, peers),
                "losses": losses,
            }
            call.forget()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        return found


def _take(call: GraphedCall, batches: Any, on_gpu: bool) -> tuple[list[float], list[float]]:
    """Return the milliseconds and the loss of each step."""
    times, losses = [], []
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(1)
    for batch in batches:
        began = time.perf_counter()
        losses.append(call(batch)["loss"].item())  # waits for the step's end
        times.append(1e3 * (time.perf_counter() - began))
    return times, losses


def _largest(size: int, peers: Peers) -> float:
    """Return the largest size of all processes, in MiB."""
    sizes: list[Any] = [size] * peers.count
    if peers.count > 1:
        dist.all_gather_object(sizes, size)
    return round(max(sizes) / 2**20, 1)


def work(way: str) -> None:
    """Measure a way in this process; the first of its processes prints a line of JSON a batch."""
    config = TrainConfig(
        DataConfig("sp500"),
        preset="guide",
        device="cuda",
        precision="bf16",
        checkpointing="full",
        model_fields={"dropout": 0.0},
    )
    splits = load_splits(config.data)
    for batch in BATCHES:
        found = Case(way, batch, config).measure(splits, STEPS, UNTIMED)
        if int(os.environ.get("RANK", 0)) == 0:
            sys.stdout.write(json.dumps({"batch": batch, **found}) + "\n")
            sys.stdout.flush()


def started(way: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Run a way in its own processes, and yield what it found batch by batch; then a refusal."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{WAYS[way]}"]
    command = [sys.executable, *(launch if WAYS[way] > 1 else []), "-m", "benchmarks.two_gpus"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--work", way], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        over = threading.Event()

        def stop() -> None:
            over.set()
            process.terminate()  # the launcher ends its own processes then

        late = threading.Timer(max(0.0, seconds), stop)
        late.start()
        missing = list(BATCHES)
        for line in process.stdout or ():
            if line.startswith('{"batch"'):
                found = json.loads(line)
                missing.remove(found["batch"])
                yield found
        process.wait()
        late.cancel()
        errors.seek(0)
        reason = "the time was over" if over.is_set() else _reason(errors.read())
    for batch in missing:
        yield {"batch": batch, "refusal": reason}


def _reason(text: str) -> str:
    """Return the message of the first Python error in what processes wrote."""
    lines = [line.split("]:", 1)[-1].strip() for line in text.splitlines()]
    named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (named or [line for line in lines if line] or ["it ended without a word"])[0][:200]


def row(way: str, found: dict[str, Any], alone: dict[str, Any] | None) -> dict[str, object]:
    """Return a row of the results; alone: what one GPU found of the same batch."""
    batch, refusal = found["batch"], found.get("refusal", "")
    cells = {"gpus": WAYS[way], "way": way, "batch": batch}
    if refusal:
        names = ("graph", "ms", "windows_per_second", "scaling", "peak_mib", "kept_mib")
        rest = dict.fromkeys((*names, "loss_difference", "last_loss"), "")
        return {**cells, **rest, "refusal": refusal}
    scaling = difference = ""
    if alone is not None and "losses" in alone:
        scaling = f"{alone['ms'] / found['ms']:.3f}"
        pairs = zip(found["losses"][:COMPARED], alone["losses"][:COMPARED], strict=True)
        difference = f"{max(math.fabs(ours / theirs - 1) for ours, theirs in pairs):.2e}"
    return {
        **cells,
        "graph": found["graph"],
        "ms": found["ms"],
        "windows_per_second": round(1e3 * batch / found["ms"], 1),
        "scaling": scaling,
        "peak_mib": found["peak_mib"],
        "kept_mib": found["kept_mib"],
        "loss_difference": difference,
        "last_loss": round(found["losses"][-1], 5),
        "refusal": "",
    }


def main() -> None:
    """Measure every way, or as one of a way's processes that way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    way = parser.parse_args().work
    if way is not None:
        work(way)
        return
    if torch.cuda.device_count() < 2:
        sys.exit(f"needs two NVIDIA GPUs, found {torch.cuda.device_count()}")
    deadline = time.monotonic() + SECONDS
    alone: dict[int, dict[str, Any]] = {}
    rows = []
    for each in WAYS:
        for found in started(each, deadline - time.monotonic()):
            alone.setdefault(found["batch"], found)
            rows.append(row(each, found, alone[found["batch"]]))
            write_rows("two_gpus", rows)
            sys.stdout.write(" ".join(f"{name}={value}" for name, value in rows[-1].items()) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
