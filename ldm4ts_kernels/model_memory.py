"""The memory law of LDM4TS training steps: what `training` does in a step, under fake tensors."""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ldm4ts_kernels.checkpointing import attention_checkpoint_contexts
from ldm4ts_kernels.law_store import kept
from ldm4ts_kernels.memory_trace import MemoryLaw, Timeline, fit_law, trace_step
from ldm4ts_kernels.model import LDM4TSConfig, LDM4TSModel
from ldm4ts_kernels.model.recompute import layer_by_layer

# Fakes cost the same at any size; the further apart, the less the 512-byte rounding weighs.
TRACED_BATCHES = (2, 32)
# What autocast computes in float32 on CUDA and in bfloat16 on a CPU (torch.amp's op reference).
FLOAT32_UNDER_CUDA_AUTOCAST = frozenset(
    {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax}
)


@dataclass(frozen=True)
class Step:
    """What decides the memory of a training step, but for its batch size."""

    config: LDM4TSConfig
    part: str  # one of PARTS
    materialised: bool  # attention with its scores in memory; else fused
    gradient_checkpointing: bool | str  # or a mode of `recompute_activations`
    precision: str  # "fp32", or "bf16" for autocast
    weights: str = "fp32"  # of what is trained but the autoencoder; or "bf16"
    optimizer: str = "adamw"
    optimizer_in_backward: bool = False
    accumulating: bool = False  # the batch is a part of a larger one


@functools.lru_cache(maxsize=64)
def memory_law(step: Step) -> MemoryLaw:
    """Return the bytes that the step holds, for any batch size; takes seconds, once a step.

    It is kept on disk for other processes: `law_store`.

    Raises ValueError for a model with a text encoder: its prompts are written from real values.
    """
    if step.config.text_encoder is not None:
        raise ValueError(
            f"text_encoder must be None for an estimate, got {step.config.text_encoder!r}"
        )
    small, large = TRACED_BATCHES
    return kept(step, lambda: fit_law(_trace(step, small), small, _trace(step, large), large))


def _trace(step: Step, batch_size: int) -> Timeline:
    model = _build(step)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the noise schedule is no buffer
        _make_fake(model, torch.bfloat16 if step.weights == "bf16" else torch.float32)
        model.train()
        module, trained, inputs, loss = PARTS[step.part](model, batch_size)
        bf16 = step.precision == "bf16"

        def autocast_loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                return loss()

        with _CudaAutocast() if bf16 else nullcontext():
            return trace_step(
                module,
                trained,
                inputs,
                autocast_loss,
                *_optimizer_of(step),
                parts=2 if step.accumulating else 1,
            )


def _optimizer_of(step: Step) -> tuple[str, bool]:
    """Return the optimizer, and whether it steps in the backward pass: stage 1 has plain AdamW."""
    if step.part == "autoencoder":
        return "adamw", False
    return step.optimizer, step.optimizer_in_backward


def _build(step: Step) -> LDM4TSModel:
    with torch.device("meta"):
        model = LDM4TSModel(
            device="meta",
            attention_backend="default",
            enable_gradient_checkpointing=False,
            **asdict(step.config),
        )
    for module in (model.unet, model.autoencoder.kl):
        if not step.materialised:
            # Every fused kernel keeps what SDPA keeps: query, key, value, output, log-sum-exp.
            module.set_attn_processor(AttnProcessor2_0())
        if step.gradient_checkpointing not in (False, "none"):
            selective = step.gradient_checkpointing == "selective"
            one = partial(_checkpoint, selective=selective)
            module.enable_gradient_checkpointing(partial(layer_by_layer, one))
    model.recomputing = step.gradient_checkpointing in (True, "full")
    model._see_in_parts = partial(_see_one_part, model)  # type: ignore[method-assign]
    return model


def _see_one_part(
    model: LDM4TSModel,
    latents: Tensor,  # (B, Z, h, w)
) -> Tensor:  # (B, C, width)
    """Decode one of the parts that are decoded one after the other: a law needs a fixed number."""
    seen = _checkpoint(model._see, latents[: model.images_at_once(True)])
    return seen.mean(dim=0).expand(len(latents), -1, -1)


def _make_fake(model: LDM4TSModel, weights: torch.dtype) -> None:
    """Give a model that was built on "meta" fake CPU tensors; `Module.to` cannot."""
    exact = set(model.autoencoder.modules())
    for module in model.modules():
        dtype = torch.float32 if module in exact else weights
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty_like(parameter, device="cpu", dtype=dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))


# The parts: (module in memory, what is trained, inputs, loss)

_Part = tuple[nn.Module, Sequence[nn.Parameter], Sequence[Tensor], Callable[[], Tensor]]


def _autoencoder(model: LDM4TSModel, batch_size: int) -> _Part:
    model.unet = None  # it is on the host in this stage
    batch = _batch(model.config, batch_size)

    def loss() -> Tensor:
        return model.autoencoder_loss(batch["history"])

    return model, model.autoencoder_parameters(), list(batch.values()), loss


def _forecaster(model: LDM4TSModel, batch_size: int) -> _Part:
    # What `freeze_autoencoder` leaves behind; it reads values, which fakes do not have.
    model.autoencoder.needs_training = False
    model.autoencoder.requires_grad_(False).train()
    batch = _batch(model.config, batch_size)

    def loss() -> Tensor:
        return model.loss(batch)["loss"]

    return model, model.trainable_parameters(), list(batch.values()), loss


def _unet(model: LDM4TSModel, batch_size: int) -> _Part:
    config = model.config
    latents = torch.empty(batch_size, *model.latent_shape)
    noise = torch.empty_like(latents)
    timesteps = torch.zeros(batch_size, dtype=torch.int64)
    tokens = torch.empty(batch_size, 2 * config.variates, config.cross_attention_dim)

    def loss() -> Tensor:
        predicted = model.unet(latents, timesteps, tokens, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    parameters = list(model.unet.parameters())
    return model.unet, parameters, (latents, noise, timesteps, tokens), loss


# The two stages of training, and the U-Net alone.
PARTS = {"autoencoder": _autoencoder, "forecaster": _forecaster, "unet": _unet}


def _batch(config: LDM4TSConfig, batch_size: int) -> dict[str, Tensor]:
    return {
        "history": torch.empty(batch_size, config.history, config.variates),
        "future": torch.empty(batch_size, len(config.horizons), len(config.targets)),
    }


class _CudaAutocast(TorchFunctionMode):
    """Under a CPU's autocast, cast to float32 where CUDA's autocast does."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in FLOAT32_UNDER_CUDA_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = tuple(item.float() if isinstance(item, Tensor) else item for item in args)
        return func(*args, **(kwargs or {}))


def _checkpoint(module: Any, *args: Any, selective: bool = False) -> Any:
    """Checkpoint as training does; no function mode reaches into a backward pass by itself."""

    def contexts() -> tuple[Any, Any]:
        forward, again = attention_checkpoint_contexts() if selective else (nullcontext(),) * 2
        return forward, _Both(again, _CudaAutocast())

    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


class _Both(ExitStack):
    """Two contexts as one."""

    def __init__(self, *contexts: Any) -> None:
        super().__init__()
        self.contexts = contexts

    def __enter__(self) -> "_Both":
        for context in self.contexts:
            self.enter_context(context)
        return self
