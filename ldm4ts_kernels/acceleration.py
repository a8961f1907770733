"""`accelerate_attention`: every attention layer of a model or pipeline, through `attention_fn`."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

from torch import nn

from ldm4ts_kernels.backends import CHAINS
from ldm4ts_kernels.layer_report import Report, ReportRow
from ldm4ts_kernels.plugged_layer import PluggedLayer, Policy
from ldm4ts_kernels.plugs import Installed, Plug, Unplugged, find_layers

Precisions = Mapping[str, str | None] | Callable[[str, nn.Module], str | None]


class AcceleratedAttention:
    """What `accelerate_attention` plugged; leaving it as a context manager removes it again."""

    def __init__(self, installed: list[Installed], unplugged: list[Unplugged]) -> None:
        self.layers = tuple(item.layer for item in installed)  # in the model's order
        self.unplugged = tuple(unplugged)
        self._installed = installed

    def report(self) -> Report:
        """Return each layer, its last eager call's shape, who served that, and why none before.

        Layers that are not plugged come last, with the reason. It stays readable after `remove`.
        """
        return Report(
            [
                *(ReportRow.of(layer) for layer in self.layers),
                *(
                    ReportRow(item.name, None, None, None, {"": (item.reason,)})
                    for item in self.unplugged
                ),
            ]
        )

    def verify(self) -> None:
        """Raise RuntimeError where a later call, such as `fuse_qkv_projections`, displaced a layer.

        Attention slicing, xformers, IP-Adapters and `set_attention_backend` do so as well.
        """
        displaced = [
            f"{installed.layer.name} now has {found}"
            for installed in self._installed
            if (found := installed.displaced())
        ]
        if displaced:
            raise RuntimeError(
                "these layers were plugged and are not any more: " + "; ".join(displaced)
            )

    def remove(self) -> None:
        """Restore what was there before. A layer displaced since is left alone, with a warning."""
        kept = []
        while self._installed:
            installed = self._installed.pop()
            if found := installed.displaced():
                kept.append(f"{installed.layer.name} ({found})")
            else:
                installed.restore()
        if kept:
            warnings.warn(
                f"these layers keep what displaced the plugged ones: {', '.join(kept)}",
                stacklevel=2,
            )

    def __enter__(self) -> "AcceleratedAttention":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def accelerate_attention(
    model_or_pipeline: Any,
    *,
    precision: str = "exact",
    backend: str = "auto",
    layers: Precisions | None = None,
) -> AcceleratedAttention:
    """Send the attention layers of a model, or of all models of a pipeline, through `attention_fn`.

    Plugged are diffusers' U-Nets, autoencoders and SD3, every model on diffusers' dispatcher (Flux,
    Wan, QwenImage, …) and every encoder on transformers' `AttentionInterface`. Only the modules of
    this model change; nothing is set for the process. Everything that training does with the model
    (checkpointing, compile, autocast) works as before.

    Args:
        model_or_pipeline: a module, changed in place, or a `DiffusionPipeline`, whose models' names
            then lead the layers' names ("unet.mid_block…").
        precision, backend: as `attention_fn` takes them, for every layer that `layers` leaves open.
        layers: the precision of some layers, None to leave one alone: a mapping of patterns, a
            layer's name or the start of one or a glob, of which the first that matches counts
            (`{"mid_block": "exact", "*": "int8"}`); or a function of name and module.

    Returns:
        The handle, a context manager, with `report`, `verify` and `remove`.

    Raises:
        ValueError: no layer is plugged, an unknown precision or backend, a pattern that matches
            nothing, or a transformers model of which some layers are to be left alone.
        RuntimeError: this version of diffusers keeps its dispatcher where it is not known.
    """
    found = [
        layer for root, prefix in _roots(model_or_pipeline) for layer in find_layers(root, prefix)
    ]
    plugs = [item for item in found if isinstance(item, Plug)]
    unplugged = [item for item in found if isinstance(item, Unplugged)]
    choose = _chooser(precision, layers, [plug.name for plug in plugs])
    chosen: list[tuple[Plug, Policy]] = []
    for plug in plugs:
        wanted = choose(plug.name, plug.module)
        if wanted is None:
            unplugged.append(Unplugged(plug.name, "left alone as layers= says"))
        else:
            chosen.append((plug, _policy(wanted, backend)))
    _check_groups(plugs, chosen)
    if not chosen:
        reasons = [f"{item.name}: {item.reason}" for item in unplugged[:5]]
        raise ValueError(
            f"model_or_pipeline must have attention layers to plug, {_kind(model_or_pipeline)} has"
            f" none ({'; '.join(reasons) or 'nothing in it looks like attention'});"
            " sdpa_override.activate() serves code that calls scaled_dot_product_attention"
        )
    installed: list[Installed] = []
    with contextlib.ExitStack() as undo:  # a plug that fails takes the others off again
        undo.callback(lambda: AcceleratedAttention(installed, unplugged).remove())
        for plug, policy in chosen:
            installed.append(plug.install(PluggedLayer(plug.name, policy)))
        undo.pop_all()
    return AcceleratedAttention(installed, unplugged)


def _kind(model_or_pipeline: Any) -> str:
    return type(model_or_pipeline).__name__


def _roots(model_or_pipeline: Any) -> Iterator[tuple[nn.Module, str]]:
    if isinstance(model_or_pipeline, nn.Module):
        yield model_or_pipeline, ""
        return
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise ValueError(
            "model_or_pipeline must be a torch module or a diffusers pipeline,"
            f" got {_kind(model_or_pipeline)}"
        )
    for name, component in components.items():
        if isinstance(component, nn.Module):
            yield component, f"{name}."


def _chooser(
    precision: str, layers: Precisions | None, names: list[str]
) -> Callable[[str, nn.Module], str | None]:
    if layers is None:
        return lambda name, module: precision
    if callable(layers):
        return layers
    if not isinstance(layers, Mapping):
        raise ValueError(f"layers must be a mapping or a function, got {type(layers).__name__}")
    for pattern in layers:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"layers: {pattern!r} matches none of {names}")
    patterns = dict(layers)
    return lambda name, module: next(
        (wanted for pattern, wanted in patterns.items() if _matches(name, pattern)), precision
    )


def _matches(name: str, pattern: str) -> bool:
    return f"{name}.".startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _policy(precision: str, backend: str) -> Policy:
    if precision not in CHAINS:
        raise ValueError(f"precision must be one of {sorted(CHAINS)}, got {precision!r}")
    known = ["auto", *(row.name for row in CHAINS[precision])]
    if backend not in known:
        raise ValueError(f"backend must be one of {known} for {precision=}, got {backend!r}")
    return Policy(precision, backend)


def _check_groups(plugs: list[Plug], chosen: list[tuple[Plug, Policy]]) -> None:
    kept = {plug.name for plug, _ in chosen}
    for group in {plug.group for plug, _ in chosen if plug.group is not None}:
        alone = [plug.name for plug in plugs if plug.group == group and plug.name not in kept]
        if alone:
            raise ValueError(
                f"layers: transformers switches whole models, so {alone[0]} cannot be left alone"
                " while other layers of its model are plugged"
            )
