"""What a process holds of the weights that it trains: all of them, or a share (FSDP2).

Replicas and Shards answer the same calls. Those that wait for the other processes say so: all must
make them, in the same order.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm4ts_kernels.checkpoints import Saveable
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.peers import Peers

HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # of a module


class Replicas:
    """Weights that every process holds whole."""

    def __init__(self, parameters: Sequence[nn.Parameter], peers: Peers | None = None) -> None:
        self.parameters, self.peers = list(parameters), peers or Peers()

    def average_gradients(self) -> None:
        """Give each parameter the mean of its gradients; waits for all, in a CUDA graph too."""
        self.peers.average_(parameter.grad for parameter in self.parameters)

    def clip_gradients(self, limit: float) -> None:
        """Scale all gradients together to a norm of at most the limit; waits for all."""
        nn.utils.clip_grad_norm_(self.parameters, limit)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the model compute in one process without the others; waits for all at its start."""
        yield

    def saveable(self, model: LDM4TSModel) -> Saveable:
        """Return what writes the model, in the first process; waits for all."""
        return model

    def gather(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors of the processes' own, in the first process; waits for all.

        Their keys are `<parameter>` or `<parameter>.<name>`, by its place in `parameters`; what
        has another key, or no dimensions, is every process' own already.
        """
        return dict(own)

    def share(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this process' own of what `gather` gave."""
        return dict(whole)


@dataclass(frozen=True)
class _WholeModel:
    """A model whose weights were gathered, as a checkpoint writes it."""

    model: LDM4TSModel
    weights: dict[str, Tensor] = field(repr=False)

    def save_pretrained(self, directory: Path) -> None:
        self.model.save_pretrained(directory, self.weights)


class Shards:
    """Weights, gradients and states of the forecaster, of which each process holds a share.

    torch.distributed.fsdp.fully_shard cuts every parameter along its first dimension. A layer of
    the U-Net is whole while it computes, forwards and backwards; what is none of its layers, from
    the beginning of a step to its end. `loss` is the module that a step calls. `parameters` are
    this process' own parts, plain tensors in the same memory, but for those that are empty: AdamW
    and the average go element by element, so that they work on parts as they do on the whole.
    """

    def __init__(self, loss: nn.Module, model: LDM4TSModel, peers: Peers) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        trained = {id(parameter) for parameter in model.trainable_parameters()}
        frozen = {each for each in loss.parameters() if id(each) not in trained}
        mesh = init_device_mesh(model.device.type, (peers.count,))
        self.peers, self.model = peers, model
        self.units: list[Any] = [*_layers(model.unet), loss]
        for unit in self.units:
            fully_shard(unit, mesh=mesh, ignored_params=frozen)
        self.sharded: list[Any] = list(model.trainable_parameters())  # DTensors
        parts = [parameter.detach().to_local() for parameter in self.sharded]
        self.held = [index for index, part in enumerate(parts) if part.numel()]
        self.parameters = [nn.Parameter(parts[index]) for index in self.held]

    def average_gradients(self) -> None:
        """Take over the gradients, which the backward pass has averaged and shared out."""
        with torch.no_grad():
            for parameter, index in zip(self.parameters, self.held, strict=True):
                gradient = self.sharded[index].grad
                parameter.grad = None if gradient is None else gradient.to_local()
        for parameter in self.sharded:
            parameter.grad = None

    def clip_gradients(self, limit: float) -> None:
        """Scale all gradients together to a norm of at most the limit; waits for all."""
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        squared = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squared)
        nn.utils.clip_grads_with_norm_(self.parameters, limit, squared.sqrt())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the model compute in one process without the others; waits for all at its start."""
        # FSDP2's hooks gather weights, and prefetch by the calls that they saw, which would then
        # differ from process to process: without them a unit is a plain module.
        hooks = [(unit, name, getattr(unit, name)) for unit in self.units for name in HOOKS]
        for unit in self.units:
            unit.unshard()
        for unit, name, _ in hooks:
            setattr(unit, name, OrderedDict())
        try:
            yield
        finally:
            for unit, name, own in hooks:
                setattr(unit, name, own)
            for unit in self.units:
                unit.reshard()

    def saveable(self, model: LDM4TSModel) -> Saveable:
        """Return what writes the model, in the first process; waits for all."""
        named: Any = model.named_parameters()
        weights = {
            name: self._keep(parameter.detach().full_tensor())
            for name, parameter in named
            if hasattr(parameter, "full_tensor")
        }
        return _WholeModel(model, weights)

    def gather(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors of the processes' own, in the first process; waits for all."""
        whole: dict[str, Tensor] = {}
        parts: dict[str, dict[int, Tensor]] = {}  # by what follows the parameter in a key
        for key, value in own.items():
            place, dot, name = key.partition(".")
            if not place.isdigit():
                whole[key] = value
            elif value.dim():
                parts.setdefault(dot + name, {})[self.held[int(place)]] = value
            else:
                whole[f"{self.held[int(place)]}{dot}{name}"] = value
        for name in sorted(parts):
            for index, parameter in enumerate(self.sharded):
                whole[f"{index}{name}"] = self._gather(parts[name].get(index), parameter)
        return whole

    def share(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this process' own of what `gather` gave."""
        places = {index: place for place, index in enumerate(self.held)}
        own = {}
        for key, value in whole.items():
            index, dot, name = key.partition(".")
            if not index.isdigit():
                own[key] = value
            elif (place := places.get(int(index))) is not None:
                own[f"{place}{dot}{name}"] = self._part(value) if value.dim() else value
        return own

    def _gather(self, part: Tensor | None, parameter: Any) -> Tensor:
        """Return the whole tensor of each process' part, which is cut as the parameter is."""
        from torch.distributed.tensor import DTensor

        own = parameter.detach().to_local()
        part = own if part is None else part.to(own.device, non_blocking=True)
        whole = DTensor.from_local(
            part,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return self._keep(whole.full_tensor())

    def _keep(self, whole: Tensor) -> Tensor:
        """Return what the first process keeps in the host's memory, and the others do not."""
        return whole.cpu() if self.peers.first else whole.new_empty(0)

    def _part(self, whole: Tensor) -> Tensor:
        size = -(-len(whole) // self.peers.count)
        return whole[self.peers.rank * size : (self.peers.rank + 1) * size]


def _layers(unet: Any) -> list[nn.Module]:
    """Return the residual layers, Transformers and resamplers of a U-Net: most of its weights."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    lists = (each for block in blocks for each in block.children())
    return [layer for each in lists if isinstance(each, nn.ModuleList) for layer in each]
