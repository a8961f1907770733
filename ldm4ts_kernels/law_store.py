"""Memory laws on disk: to trace a step takes seconds, and every command is a new process.

A law goes by what it depends on: the step, and the code that traces it. It is an aid: where a file
cannot be read or written, the step is traced.
"""

import hashlib
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldm4ts_kernels.caches import code_version, user_cache
from ldm4ts_kernels.memory_trace import MemoryLaw
from ldm4ts_kernels.storages import Storages

logger = logging.getLogger("ldm4ts_kernels")

MOST_FILES = 100  # half a megabyte each; the longest unused go


def kept(step: Any, trace: Callable[[], MemoryLaw]) -> MemoryLaw:
    """Return the law of a step, a dataclass, from disk or else from `trace`, and keep it there."""
    path = user_cache("laws") / f"{_digest(step)}.law"
    try:
        law = _read(path)
        os.utime(path)
        return law
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        logger.info("%s is no memory law, and is replaced: %s", path, error)
    law = trace()
    try:
        _write(path, law)
    except OSError as error:
        logger.info("the memory law of this model is not kept: %s", error)
    return law


def _digest(step: Any) -> str:
    depends = [asdict(step), code_version()]
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> MemoryLaw:
    found = torch.load(path, weights_only=True)
    before, start, stop = found["places"].tolist()
    storages = Storages(
        tuple(found["numbers"].tolist()),
        tuple(found["sizes"].tolist()),
        before,
        frozenset(found["states"].tolist()),
        range(start, stop),
    )
    lines = (found[name] for name in ("size_constant", "size_slope"))
    return MemoryLaw(found["phases"], found["constant"], found["slope"], storages, *lines)


def _write(path: Path, law: MemoryLaw) -> None:
    numbers, sizes, before, states, come = law.storages
    found = {
        "phases": law.phases,
        "constant": law.constant,
        "slope": law.slope,
        "numbers": torch.tensor(numbers),
        "sizes": torch.tensor(sizes),
        "states": torch.tensor(sorted(states), dtype=torch.int64),
        "places": torch.tensor([before, come.start, come.stop]),
        "size_constant": law.size_constant,
        "size_slope": law.size_slope,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(found, file)
    os.replace(file.name, path)
    files = sorted(path.parent.glob("*.law"), key=lambda each: each.stat().st_mtime)
    for old in files[:-MOST_FILES]:
        old.unlink(missing_ok=True)
