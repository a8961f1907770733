"""What this machine has for attention and training, and the command that mends what is missing."""

import functools
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ldm4ts_kernels import native
from ldm4ts_kernels.attention import explain
from ldm4ts_kernels.backends import CHAINS, Backend
from ldm4ts_kernels.requirements import Requires, import_error, version

GIB = 2**30
NEEDS_GPU = "needs an NVIDIA GPU and its driver"
BUILD = "LDM4TS_BUILD_CUDA=1 pip install --no-build-isolation -e .  # in a clone; needs nvcc"
TRITON = "pip install triton"
# What installs each backend; PyPI has sageattention 1.x alone.
INSTALLS = {
    "native": BUILD,
    "native_int8": BUILD,
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "flash_attn4": "pip install flash-attn-4",
    "triton": TRITON,
    "triton_int8": TRITON,
    "sageattention2": "pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention",
    "sageattention": "pip install sageattention==1.0.6",
}
EXTRAS = {
    "ldm4ts": ("accelerate", "arch", "diffusers", "matplotlib", "pandas", "typer"),
    "panel": ("nicegui",),
}


@dataclass(frozen=True)
class Finding:
    """One line about the machine; ok None: it may be missing. fix None: no command helps."""

    name: str
    found: str
    ok: bool | None = True
    fix: str | None = None


@dataclass(frozen=True)
class BackendFinding:
    """A backend of one chain on this machine: whether it can run, whether `auto` takes it."""

    name: str
    precision: str
    trains: bool  # can run where a gradient is needed
    infers: bool
    chosen: bool  # `auto` takes it in training
    reasons: tuple[str, ...]  # against it, in training; where it trains: why `auto` passes it by
    fix: str | None


@dataclass(frozen=True)
class Diagnosis:
    """All findings; `asdict` gives what `ldm4ts doctor --json` prints."""

    machine: tuple[Finding, ...]
    backends: tuple[BackendFinding, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as plain lists and dicts."""
        return asdict(self)


def diagnose(head_dim: int = 64, tokens: int = 1024) -> Diagnosis:
    """Find what this machine has: GPU, driver, torch, CUDA, the extras, each attention backend.

    The backends are asked about self-attention of `tokens` tokens and 8 heads of head_dim in
    bfloat16, on the GPU if there is one.
    """
    machine = (_system(), *_gpus(), _driver(), _torch(), *_libraries())
    return Diagnosis(machine, tuple(_backends(head_dim, tokens)))


def diagnose_elsewhere() -> Diagnosis:
    """Return `diagnose()`; with a GPU from another process, as a CUDA context stays in memory."""
    if not torch.cuda.is_available():
        return diagnose()
    command = [sys.executable, "-m", "ldm4ts_kernels.cli", "doctor", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return read_diagnosis(json.loads(ended.stdout))


def read_diagnosis(found: dict[str, Any]) -> Diagnosis:
    """Return what `Diagnosis.as_dict` gave, and JSON may have carried."""
    backends = [
        BackendFinding(**{**row, "reasons": tuple(row["reasons"])}) for row in found["backends"]
    ]
    return Diagnosis(tuple(Finding(**row) for row in found["machine"]), tuple(backends))


def _system() -> Finding:
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", system)


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPU", "torch finds none: training runs on the CPU", False, _gpu_fix())]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        found.append(Finding(f"GPU {index}", text))
    return found


def _gpu_fix() -> str | None:
    """Return what would let torch see the GPU: the driver sees one, torch has no CUDA."""
    if _driver_version() and torch.version.cuda is None:
        return "pip install --force-reinstall torch  # a build with CUDA"
    return None


@functools.cache
def _driver_version() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    ended = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    lines = ended.stdout.split()
    return lines[0] if ended.returncode == 0 and lines else None


def _driver() -> Finding:
    found = _driver_version()
    if found is None:
        return Finding("driver", f"nvidia-smi finds none: CUDA {NEEDS_GPU}", False)
    return Finding("driver", found)


def _torch() -> Finding:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else ""
    return Finding("torch", f"{torch.__version__}, {cuda}{cudnn}")


def _libraries() -> list[Finding]:
    found = [_package("triton", TRITON, None)]
    nvcc = shutil.which("nvcc")
    found.append(
        Finding(
            "nvcc", nvcc or "not found; only building the kernels needs it", True if nvcc else None
        )
    )
    error = native.load_error()
    found.append(
        Finding("compiled kernels", error or "load", None if error else True, error and BUILD)
    )
    for extra, packages in EXTRAS.items():
        command = f"pip install 'ldm4ts-kernels[{extra}]'"
        found += [_package(package, command, False) for package in packages]
    return found


def _package(name: str, command: str, ok_if_missing: bool | None) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", ok_if_missing, command)


def _backends(head_dim: int, tokens: int) -> Iterator[BackendFinding]:
    training = torch.zeros(
        (1, 8, tokens, head_dim),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16,
        requires_grad=True,
    )
    inference = training.detach()
    for precision, chain in CHAINS.items():
        explained = explain(training, training, training, precision=precision)
        inferring = explain(inference, inference, inference, precision=precision)
        for row in chain:
            trains = not row.requires.unmet(explained.call)
            yield BackendFinding(
                name=row.name,
                precision=precision,
                trains=trains,
                infers=not row.requires.unmet(inferring.call),
                chosen=row.name == explained.chosen,
                reasons=tuple(explained.reasons[row.name]),
                fix=_fix(row, trains, bool(explained.reasons[row.name])),
            )


def _fix(row: Backend, trains: bool, passed_by: bool) -> str | None:
    """Return what makes the row serve: its installation, or asking for it by name."""
    if trains:
        return f'attention_fn(..., backend="{row.name}")' if passed_by else None
    return INSTALLS.get(row.name) if _is_missing(row.requires) else None


def _is_missing(requires: Requires) -> bool:
    """Say whether the row's library is not installed, does not load, or has another version."""
    if requires.loads is not None:
        return requires.loads() is not None
    if requires.module is None:
        return False
    if import_error(requires.module) is not None:
        return True
    found = version(requires.module).split(".")[0]
    return requires.major is not None and found != str(requires.major)
