"""One of two processes of tests/test_distributed.py: RANK STORE DEVICE RUN OUTPUT MODE STOP.

Shows that it holds half of a model's weights, gradients and states; then trains with shared states
in OUTPUT, by the options of RUN but with checkpointing MODE, on from where it is up to step STOP.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from tiny_model import batch_of, ready

from ldm4ts_kernels.optimizers import build_optimizer
from ldm4ts_kernels.peers import Peers
from ldm4ts_kernels.runs import read_config
from ldm4ts_kernels.sharding import Shards
from ldm4ts_kernels.training import TrainingInterrupted, train
from ldm4ts_kernels.training_step import StageLoss, TrainingStep

WORLD = 2


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_shares(peers: Peers, device: torch.device) -> None:
    """Assert that weights, gradients and states of a step are half of the model's, in bytes."""
    torch.manual_seed(0)
    model = ready().to(device)
    whole = bytes_of(model.trainable_parameters())
    loss = StageLoss(model, "forecaster").train()
    shards = Shards(loss, model, peers)
    optimizer = build_optimizer(shards.parameters, 1e-3, 0.0)
    step = TrainingStep(loss, model, shards, optimizer, clip=1.0)
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(bytes_of(each.grad for each in shards.parameters))
    )
    batch = {name: value.to(device) for name, value in batch_of(WORLD).items()}
    mine = {name: value[peers.rank : peers.rank + 1] for name, value in batch.items()}
    for _ in range(2):
        step(mine)
    states = [optimizer.state[each] for each in shards.parameters]
    found = {
        "weights": bytes_of(each.to_local() for each in model.trainable_parameters()),
        "gradients": gradients[-1],
        "averages": bytes_of(state["exp_avg"] for state in states),
        "squares": bytes_of(state["exp_avg_sq"] for state in states),
    }
    for name, size in found.items():
        assert 0.45 * whole < size < 0.55 * whole, (name, size, whole)
    sys.stdout.write(f"holds {found['weights'] / whole:.3f} of {whole} bytes\n")


def main() -> None:
    rank, store, kind, run, output, mode, stop = int(sys.argv[1]), *sys.argv[2:8]
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=WORLD)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1"}
    check_shares(Peers(rank, WORLD), device)
    config = replace(read_config(run), output=output, resume=True, shard_states=True)
    config = replace(config, checkpointing=mode)
    try:
        result = train(
            config, lambda report: (report.stage, report.step) == ("forecaster", int(stop))
        )
    except TrainingInterrupted as interrupted:
        sys.stdout.write(f"{interrupted}\n")
    else:
        sys.stdout.write(f"crps {result.test.scores['ldm4ts']['crps']}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
