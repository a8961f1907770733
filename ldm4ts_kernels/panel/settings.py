"""What the panel's widgets hold, one set for all browsers, and how it reads for the functions."""

import importlib.util
from typing import Any

from nicegui import binding

from ldm4ts_kernels.data import DATASETS, DataConfig, OptionError
from ldm4ts_kernels.panel.estimates import Question, about_card, about_estimate
from ldm4ts_kernels.run_file import parse_horizons, parse_names
from ldm4ts_kernels.runs import TrainConfig
from ldm4ts_kernels.vram import LARGEST_BATCH

# The original guide's names for attention_backend, in its order.
ATTENTION = {
    "default": "Default (No optimization)",
    "sage": "SageAttention (INT8)",
    "flash": "FlashAttention",
    "auto": "Auto",
}
CARDS_GB = (6, 8, 12, 16)


@binding.bindable_dataclass
class Settings:
    """The widgets' values; a number is None while its field is empty."""

    preset: str = "guide"
    attention: str = "flash"
    gradient_checkpointing: bool = True
    checkpointing: str = "full"  # what is recomputed, where the switch is on
    optimizer: str = "adamw"
    optimizer_in_backward: bool = False
    weights: str = "fp32"
    precision: str = "fp32"
    batch_size: float | None = 4
    image_size: float | None = 224
    card_gb: float | None = 8
    # Training
    data: str = "sp500"
    data_path: str = ""
    timestamp: str = ""
    columns: str = ""
    targets: str = ""
    history: float | None = None
    horizons: str = ""
    period: float | None = None
    steps: float | None = None
    autoencoder_steps: float | None = None
    name: str = "panel"
    # What is shown
    run: str = ""

    def batch(self) -> int:
        """Return the batch size. Raises OptionError for an empty field or one out of range."""
        return _whole("batch_size", self.batch_size, 1, LARGEST_BATCH)

    def mode(self) -> str:
        """Return the mode of gradient checkpointing; "none" where the switch is off."""
        return self.checkpointing if self.gradient_checkpointing else "none"

    def estimate_question(self) -> Question:
        """Return what to ask for the estimate. Raises OptionError for a field that is empty."""
        return about_estimate(
            preset=self.preset,
            backend="default" if self.attention == "default" else "flash",
            gradient_checkpointing=self.mode(),
            precision=self.precision,
            optimizer=self.optimizer,
            optimizer_in_backward=bool(self.optimizer_in_backward),
            weights=self.weights,
            image_size=self._pixels(),
        )

    def card_question(self, card_gb: float, batch_size: int = 4) -> Question:
        """Return what to ask for the settings that fit a card."""
        return about_card(
            vram_gb=card_gb,
            batch_size=batch_size,
            preset=self.preset,
            image_size=self._pixels(),
            lean=importlib.util.find_spec("torchao") is not None,
        )

    def data_config(self) -> DataConfig:
        """Return the choice of data. Raises OptionError for horizons that do not read."""
        own_file = DATASETS[self.data].needs_path
        return DataConfig(
            name=self.data,
            path=(self.data_path or None) if own_file else None,
            timestamp=self.timestamp or None,
            columns=parse_names(self.columns) if self.columns else None,
            targets=parse_names(self.targets) if self.targets else None,
            history=_optional("history", self.history),
            horizons=parse_horizons(self.horizons) if self.horizons else None,
            period=_optional("period", self.period),
        )

    def run_options(self, output: str) -> dict[str, Any]:
        """Return the options of `ldm4ts train --config`, as a file holds them."""
        data = vars_of(self.data_config())
        counts = {
            name: _optional(name, getattr(self, name)) for name in ("steps", "autoencoder_steps")
        }
        pixels = self._pixels()[0]
        self.check_levers()
        return {
            "output": output,
            "data": data,
            **self._levers(),
            "model_fields": {"image_size": [pixels, pixels]},
            **{name: count for name, count in counts.items() if count is not None},
        }

    def check_levers(self) -> None:
        """Raise OptionError, as training will, for a lever that another one excludes."""
        TrainConfig(**self._levers())

    def _levers(self) -> dict[str, Any]:
        on = bool(self.optimizer_in_backward)
        return {
            "preset": self.preset,
            "attention_backend": self.attention,
            "checkpointing": self.mode(),
            "optimizer": self.optimizer,
            "weights": self.weights,
            "optimizer_in_backward": on,
            **({"gradient_clip": 0.0} if on else {}),  # a norm of all gradients is never known
            "precision": self.precision,
            "batch_size": self.batch(),
        }

    def _pixels(self) -> tuple[int, int]:
        pixels = _whole("image_size", self.image_size, 16, 1024)
        if pixels % 16:
            raise OptionError(f"image_size: expected a multiple of 16, got {pixels}")
        return pixels, pixels


def vars_of(data: DataConfig) -> dict[str, Any]:
    """Return the fields that were chosen, tuples as lists, as JSON holds them."""
    given = {name: value for name, value in vars(data).items() if value is not None}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}


def _optional(name: str, value: float | None) -> int | None:
    return None if value is None else _whole(name, value, 1, 10**9)


def _whole(name: str, value: float | None, least: int, most: int) -> int:
    if value is None or value != int(value) or not least <= value <= most:
        got = "nothing" if value is None else f"{value:g}"
        raise OptionError(f"{name}: expected a whole number from {least} to {most}, got {got}")
    return int(value)
