"""Where this package keeps on disk what takes long to compute, and for which code that holds."""

import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path

PACKAGE = Path(__file__).parent


def user_cache(kind: str) -> Path:
    """Return a folder of $LDM4TS_CACHE, else of ldm4ts-kernels in the user's cache."""
    if chosen := os.environ.get("LDM4TS_CACHE"):
        return Path(chosen) / kind
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldm4ts-kernels" / kind


@functools.cache
def code_version() -> str:
    """Return a digest of what traces depend on: this package's text, torch and diffusers."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent != PACKAGE / "panel":  # which only asks
            digest.update(path.read_bytes())
    for library in ("torch", "diffusers"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()[:16]
