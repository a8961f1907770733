"""Sets of training levers: what a step of LDM4TS with one of them takes of a GPU, and how long.

A step is that of `ldm4ts train` (forward, backward, clipping, AdamW) on random windows of preset
`guide`. The guide's own sets run as the guide has them, launch by launch in fp32, each step
encoding its windows; ours are CUDA graphs over latents that were encoded before.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.measure import free_memory
from ldm4ts_kernels.graphs import CudaGraphs, GraphedCall
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.model.placement import kept_on_host
from ldm4ts_kernels.optimizers import build_optimizer, step_in_backward
from ldm4ts_kernels.process import accelerator_of_one_run
from ldm4ts_kernels.sharding import Replicas
from ldm4ts_kernels.training_step import StageLoss, TrainingStep, lay_out_weights

# Steps that are not timed, and those that are, launch by launch and as a graph: of the latter, the
# first three run as they are and the fourth is captured.
STEPS = {False: (3, 6), True: (5, 12)}


@dataclass(frozen=True)
class Levers:
    """One row: a name and the options of `ldm4ts train` that differ from the plainest."""

    name: str
    attention: str = "flash"
    precision: str = "bf16"
    checkpointing: str = "none"
    optimizer: str = "adamw"
    weights: str = "fp32"
    in_backward: bool = False
    channels_last: bool = False
    accumulate: int = 1
    graph: bool = True  # and cached latents
    decoded_at_once: int = 1  # images, where activations are recomputed; `ldm4ts train` has two


GUIDE = (
    Levers("Default", "default", "fp32", graph=False),
    Levers("Default + GC", "default", "fp32", "full", graph=False),
    Levers("SageAttention", "sage", "bf16", graph=False),  # INT8 kernels take 16 bits
    Levers("SageAttention + GC", "sage", "bf16", "full", graph=False),
    Levers("FlashAttention", "flash", "fp32", graph=False),
    Levers("FlashAttention + GC", "flash", "fp32", "full", graph=False),
)
LEAN = Levers("leanest", "flash", "bf16", "full", "adamw8bit", "bf16")
OURS = (
    Levers("graph, fp32", precision="fp32"),
    Levers("graph, bf16"),
    Levers("graph, bf16 + GC", checkpointing="full"),
    replace(LEAN, name="+ 8-bit AdamW", weights="fp32"),
    replace(LEAN, name="+ bf16 weights"),
    replace(LEAN, in_backward=True),
)
CHANNELS_LAST = tuple(
    replace(levers, name=f"{levers.name}, channels_last", channels_last=True)
    for levers in (OURS[1], OURS[-1])
)


@contextmanager
def prepared(levers: Levers, px: int, batch_size: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Give the step on a GPU, a call from a batch to its losses, and a batch in pinned memory.

    Raises RuntimeError where what was measured before is still there.
    """
    free_memory()
    torch.manual_seed(0)
    with accelerator_of_one_run("cuda", levers.precision) as accelerator, ExitStack() as undo:
        with torch.device("cuda"):
            model = LDM4TSModel(
                image_size=(px, px),
                attention_backend=levers.attention,
                enable_gradient_checkpointing=levers.checkpointing,
                decoded_at_once=levers.decoded_at_once,
            )
        batch = _batch(model, batch_size, encoded=levers.graph)
        loss = accelerator.prepare_model(StageLoss(model, "forecaster"), evaluation_mode=True)
        graphs = CudaGraphs(model.device) if levers.graph else None
        step = _step(model, levers, loss.train())
        if levers.in_backward:
            undo.enter_context(step_in_backward(step.optimizer))
        if levers.graph:
            undo.enter_context(kept_on_host(model, "forecaster"))
        call = GraphedCall(levers.name, step, model.device, graphs)
        undo.callback(call.forget)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield call, batch


def measure(levers: Levers, px: int, batch_size: int) -> dict[str, Any]:
    """Take steps and return their median milliseconds, host and device, and the peak memory.

    allocated: the peak of tensors and workspaces; in_all: what the caching allocator reserved for
    them and what the driver counts for the process beyond it.
    """
    untimed, timed = STEPS[levers.graph]
    times, losses = [], []
    with prepared(levers, px, batch_size) as (call, batch):
        for _ in range(untimed + timed):
            torch.cuda.synchronize()
            began = time.perf_counter()
            loss = call(batch)["loss"]
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
            losses.append(loss.item())
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        return {
            "captured": call.replay is not None,
            "ms": round(statistics.median(times[untimed:]), 2),
            "allocated_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1),
            "in_all_mib": round((torch.cuda.max_memory_reserved() + context) / 2**20, 1),
            "last_loss": round(losses[-1], 5),
        }


def _batch(model: LDM4TSModel, batch_size: int, encoded: bool) -> dict[str, torch.Tensor]:
    config = model.config
    history = torch.randn(batch_size, config.history, config.variates).cumsum(1)
    future = torch.randn(batch_size, len(config.horizons), len(config.targets))
    model.freeze_autoencoder(history[:2])
    batch = {"history": history, "future": future}
    if encoded:
        batch |= {name: value.cpu() for name, value in model.encode_frozen(history).items()}
    return {name: value.pin_memory() for name, value in batch.items()}


def _step(model: LDM4TSModel, levers: Levers, loss: torch.nn.Module) -> TrainingStep:
    lay_out_weights(model, levers.weights, levers.channels_last)
    parameters = model.trainable_parameters()
    optimizer = build_optimizer(parameters, 1e-4, 1e-2, levers.optimizer, levers.in_backward)
    clip = 0.0 if levers.in_backward else 1.0
    held = Replicas(parameters)
    return TrainingStep(loss, model, held, optimizer, levers.accumulate, clip, levers.in_backward)
