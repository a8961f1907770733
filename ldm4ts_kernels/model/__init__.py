"""LDM4TS: a forecaster that reads a time series as an image and denoises it in latent space.

Needs the extra `ldm4ts` (diffusers); `import ldm4ts_kernels` alone never comes here.
"""

from ldm4ts_kernels.model.config import PRESETS, LDM4TSConfig
from ldm4ts_kernels.model.forecaster import LDM4TSModel

__all__ = ["PRESETS", "LDM4TSConfig", "LDM4TSModel"]
