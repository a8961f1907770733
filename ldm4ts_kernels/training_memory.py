"""The bytes of a training step on a GPU: its traced tensors, and what is no tensor.

Tensors are traced (`model_memory`), so the figures are those of the configured model and need no
GPU. What torch's allocator holds beyond them is replayed; the rest comes as constants that were
measured, each in a row of its own.
"""

from typing import Any, NamedTuple

GIB = 2**30  # of every "gb" here: a card sold as 8 GB has 8 GiB
MIB = 2**20
PARTS = {"model": ("autoencoder", "forecaster"), "unet": ("unet",)}

# NVIDIA H100, torch 2.11, CUDA 13.0, 2026-11-27, python -m benchmarks.vram_accuracy --measure: what
# brings most of 82 configurations closest. Other GPUs and versions differ.
WORKSPACES = 80 * MIB  # allocated beyond the traced tensors: cuBLAS' workspaces and the like
DECODING = {"fp32": 230, "bf16": 190}  # and by cuDNN, a pixel of the images decoded together
# What the allocator holds beyond the tensors is replayed (`Storages.reserved`). That is too little
# for the autoencoder's convolutions in float32: there it is this share of the tensors at least.
AUTOENCODER_RESERVE = 0.2
CUDA_CONTEXT = 815 * MIB  # outside the allocator: the driver's context and the loaded kernels


class TrainingMemory(NamedTuple):
    """What decides the memory of a training run, but for its batch size."""

    config: Any  # LDM4TSConfig
    part: str
    materialised: bool
    gradient_checkpointing: bool | str
    precision: str
    weights: str = "fp32"
    optimizer: str = "adamw"
    optimizer_in_backward: bool = False
    accumulating: bool = False
    graph: bool = False  # the step is recorded as a CUDA graph

    def stage(self, name: str, batch_size: int) -> tuple[Any, dict[str, int]]:
        """Return the Peak of a stage's step, and all its bytes at that moment by category."""
        law, windows, libraries = self._law(name, batch_size)
        peak, passing = law.peak(windows), libraries - WORKSPACES
        reserved = law.reserved(windows, WORKSPACES, passing, graph=self.graph)
        least = AUTOENCODER_RESERVE * peak.total if name == "autoencoder" else 0
        allocator = max(round(least), reserved - peak.total - libraries)
        table = {**peak.categories, "workspaces": libraries, "allocator": allocator}
        return peak, {**table, "cuda_context": CUDA_CONTEXT}

    def stages(self, batch_size: int) -> dict[str, tuple[Any, dict[str, int]]]:
        """Return what `stage` says of each stage."""
        return {name: self.stage(name, batch_size) for name in self._names()}

    def table(self, batch_size: int) -> dict[str, int]:
        """Return the bytes at the peak of the stage that takes most, by category."""
        return largest(self.stages(batch_size))[1]

    def fits(self, batch_size: int, vram_gb: float) -> bool:
        """Whether such a step takes at most vram_gb · 2^30 bytes."""
        for name in self._names():  # what no allocator can spare is known at once
            law, windows, libraries = self._law(name, batch_size)
            if law.peak(windows).total + libraries + CUDA_CONTEXT > vram_gb * GIB:
                return False
        return sum(self.table(batch_size).values()) <= vram_gb * GIB

    def _names(self) -> tuple[str, ...]:
        names = PARTS[self.part]
        if self.config.autoencoder is not None:  # a pretrained one is not trained first
            names = tuple(name for name in names if name != "autoencoder")
        return names

    def _law(self, name: str, batch_size: int) -> tuple[Any, int, int]:
        """Return a stage's memory law, the windows it sees at once, and the libraries' bytes."""
        from ldm4ts_kernels.model.recompute import autoencoder_parts
        from ldm4ts_kernels.model_memory import Step, memory_law

        parts, mode = 1, self.gradient_checkpointing
        if name == "autoencoder":
            parts = autoencoder_parts(batch_size, self.config.image_size, mode)
        law = memory_law(Step(self.config, name, *self[2:-2], self.accumulating or parts > 1))
        libraries = workspaces(self.config, name, batch_size, mode, self.precision)
        return law, batch_size // parts, libraries


def largest(stages: dict[str, tuple[Any, dict[str, int]]]) -> tuple[Any, dict[str, int]]:
    """Return what `TrainingMemory.stage` says of the stage that takes most in all."""
    return max(stages.values(), key=lambda stage: sum(stage[1].values()))


def workspaces(
    config: Any, stage: str, batch_size: int, gradient_checkpointing: bool | str, precision: str
) -> int:
    """Return the bytes that libraries take beside the tensors of a step of one of PARTS' stages."""
    from ldm4ts_kernels.model.recompute import images_at_once

    if stage != "forecaster":  # the others decode nothing, or train what decodes
        return WORKSPACES
    height, width = config.image_size
    images = batch_size
    if gradient_checkpointing in (True, "full"):
        images = min(images, images_at_once(config.image_size, config.decoded_at_once))
    return WORKSPACES + images * height * width * DECODING[precision]
