"""How each kind of attention layer is found in a model, plugged into `attention_fn`, and restored.

diffusers has two kinds, layers with a processor of their own and layers whose processor calls its
dispatcher; transformers has one. A layer of no known kind is found too, and stays as it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ldm4ts_kernels import dispatcher, encoders
from ldm4ts_kernels.plugged_layer import PluggedLayer
from ldm4ts_kernels.processors import AttentionProcessor, JointAttentionProcessor

# The processors of diffusers.models.attention_processor that ours compute the same as.
REPLACED: dict[str, Callable[[PluggedLayer], Any]] = {
    "AttnProcessor": AttentionProcessor,
    "AttnProcessor2_0": AttentionProcessor,
    "SlicedAttnProcessor": AttentionProcessor,
    "XFormersAttnProcessor": AttentionProcessor,
    "JointAttnProcessor2_0": JointAttentionProcessor,
    "XFormersJointAttnProcessor": JointAttentionProcessor,
}


class Installed(NamedTuple):
    """A plugged layer: `displaced` says what has taken its place since, None while it stands."""

    layer: PluggedLayer
    displaced: Callable[[], str | None]
    restore: Callable[[], None]


@dataclass(frozen=True)
class Plug:
    """A layer that can be plugged. Layers of one `group` are plugged together or not at all."""

    name: str
    module: nn.Module
    install: Callable[[PluggedLayer], Installed]
    group: str | None = None


@dataclass(frozen=True)
class Unplugged:
    """An attention layer that stays as it is, and why."""

    name: str
    reason: str


def find_layers(root: nn.Module, prefix: str = "") -> Iterator[Plug | Unplugged]:
    """Yield every attention layer of a model in its order, its name after `prefix`.

    A layer is a module with a diffusers processor, one that calls transformers' registry, or one
    that calls torch's attention itself.
    """
    encoder, encoder_name = None, ""
    for name, module in root.named_modules():
        if encoder is None or not f"{name}.".startswith(encoder_name):
            encoder = module if hasattr(module, "_can_set_attn_implementation") else None
            encoder_name = f"{name}." if name else ""
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(module, "set_processor"):
            yield _with_processor(prefix + name, module, processor)
        elif encoder is not None and encoders.is_encoder_layer(module):
            yield _of_encoder(prefix + name, module, encoder, prefix + encoder_name)
        elif isinstance(module, nn.MultiheadAttention) or (
            "scaled_dot_product_attention" in encoders.names_used(module)
        ):
            kind = type(module).__name__
            yield Unplugged(prefix + name, f"{kind} calls torch's attention by itself")


def _with_processor(name: str, module: nn.Module, processor: Any) -> Plug | Unplugged:
    kind = type(processor)
    if kind in (AttentionProcessor, JointAttentionProcessor):
        return Plug(name, module, _processor_installer(module, kind))
    if dispatcher.is_dispatched(processor):
        return Plug(name, module, _dispatcher_installer(module))
    if kind.__module__ != "diffusers.models.attention_processor" or kind.__name__ not in REPLACED:
        return Unplugged(name, f"its {kind.__name__} computes more than, or other than, attention")
    ours = REPLACED[kind.__name__]
    if ours is AttentionProcessor and (module.added_kv_proj_dim or module.only_cross_attention):
        return Unplugged(name, "projects added keys, which is not supported yet")
    return Plug(name, module, _processor_installer(module, ours))


def _of_encoder(name: str, module: nn.Module, encoder: Any, group: str) -> Plug | Unplugged:
    if not encoder._can_set_attn_implementation():
        kind = type(encoder).__name__
        return Unplugged(name, f"{kind} does not use transformers' AttentionInterface throughout")
    return Plug(name, module, _encoder_installer(module, encoder), group)


def _processor_installer(
    module: Any, processor: Callable[[PluggedLayer], Any]
) -> Callable[[PluggedLayer], Installed]:
    def install(layer: PluggedLayer) -> Installed:
        before, ours = module.processor, processor(layer)
        module.set_processor(ours)
        return Installed(
            layer,
            lambda: None if module.processor is ours else type(module.processor).__name__,
            lambda: module.set_processor(before),
        )

    return install


def _dispatcher_installer(module: Any) -> Callable[[PluggedLayer], Installed]:
    def install(layer: PluggedLayer) -> Installed:
        before, state = module.processor, dict(vars(module.processor))
        ours = dispatcher.dispatched_processor(before, layer.policy)
        member = ours._attention_backend
        if ours is not before:
            module.set_processor(ours)
        hook = module.register_forward_pre_hook(dispatcher.Announce(layer))

        def displaced() -> str | None:
            if module.processor is not ours:
                return type(module.processor).__name__
            found = ours._attention_backend
            return None if found is member else f"attention backend {found!s}"

        def restore() -> None:
            hook.remove()
            if ours is not before:
                module.set_processor(before)
            elif "_attention_backend" in state:
                before._attention_backend = state["_attention_backend"]
            else:
                del before._attention_backend

        return Installed(layer, displaced, restore)

    return install


def _encoder_installer(module: nn.Module, encoder: Any) -> Callable[[PluggedLayer], Installed]:
    def install(layer: PluggedLayer) -> Installed:
        before = vars(module).get(encoders.LAYER)
        switched_from = None
        if encoder.config._attn_implementation != encoders.NAME:
            switched_from = encoders.implementations(encoder)
            encoders.switch(encoder)
        setattr(module, encoders.LAYER, layer)

        def displaced() -> str | None:
            found = encoder.config._attn_implementation
            return None if found == encoders.NAME else f"attention implementation {found!r}"

        def restore() -> None:
            if before is None:
                delattr(module, encoders.LAYER)
            else:
                setattr(module, encoders.LAYER, before)
            if switched_from is not None:
                encoder.set_attn_implementation(switched_from)

        return Installed(layer, displaced, restore)

    return install
