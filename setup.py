"""Builds the compiled kernels where nvcc, ninja and torch's headers are; else pure Python.

One shared library on LibTorch's stable ABI, without Python's C API: one wheel serves every Python
and every torch ≥ 2.10. Environment, next to CUDA_HOME and MAX_JOBS:
    LDM4TS_BUILD_CUDA   auto (default), 1 (a failed build is an error) or 0 (pure Python)
    LDM4TS_CUDA_ARCHS   such as "80;90+PTX"; else TORCH_CUDA_ARCH_LIST; else DEFAULT_ARCHS
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "native"  # kept: a later build compiles what changed
# The kinds of GPU, by an SM's shared memory, on which an architecture's code runs, PTX on all:
# bits for csrc/sm80/tiles.h, which leaves out the tiles of others.
ADA, AMPERE, HOPPER = 1, 2, 4
KINDS = {80: ADA | AMPERE, 86: ADA, 87: AMPERE, 89: ADA, 90: HOPPER}
ALL_KINDS = ADA | AMPERE | HOPPER
DEFAULT_ARCHS = "80+PTX;90"  # sm_80's machine code runs on 8.6 and 8.9 too, its PTX on what comes
# nvcc also drives g++ for ops.cpp, the one file that includes torch, and the link.
NINJA = """
rule compile
  command = {nvcc} -O3 -std=c++17 -I{csrc} -isystem {torch}/include --expt-relaxed-constexpr $
      {archs} --compress-mode=size -diag-suppress 177 -Xcompiler -fPIC,-fvisibility=hidden $
      -DTORCH_TARGET_VERSION=0x020a000000000000 $
      -DLDM_SHARED_KINDS={kinds} $defines -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared -cudart static $in -o $out -L{torch}/lib -L{cuda}/lib $
      -Xlinker -s,--no-as-needed,-ltorch,--as-needed
"""


def package_folder(name: str) -> Path | None:
    """Find a package here or, from pip's isolated build, in the environment to install into."""
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    look = f"import importlib.util as u; print(u.find_spec('{name}').submodule_search_locations[0])"
    outside = subprocess.run([sys.executable, "-I", "-c", look], capture_output=True, text=True)
    return Path(outside.stdout.strip()) if outside.returncode == 0 else None


def arch_flags() -> tuple[str, int]:
    """One PTX, of the oldest architecture, becomes each one's machine code: half the time.

    Also returns the kinds of GPU on which the code runs.
    """
    chosen = os.environ.get("LDM4TS_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    codes, numbers = [], []
    for arch in re.split(r"[;,\s]+", (chosen or DEFAULT_ARCHS).strip("; ")):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", arch)
        if not match or int(match[1]) < 8:
            sys.exit(f"LDM4TS_CUDA_ARCHS must list architectures from 80 on, got {arch!r}")
        numbers.append(int(match[1] + match[2]))
        codes.append(f"sm_{numbers[-1]}{match[3]}")
    virtual = f"compute_{min(numbers)}"
    kinds = 0
    for number in numbers:
        kinds |= KINDS.get(number, ALL_KINDS)
    if "+PTX" in (chosen or DEFAULT_ARCHS):
        codes, kinds = [*codes, virtual], ALL_KINDS
    return f"-gencode arch={virtual},code=[{','.join(codes)}]", kinds


def build_library() -> str | None:
    """Bring BUILD/_C.so up to date; return the reason where that cannot be."""
    wheels = package_folder("nvidia")
    homes = [Path(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    homes += [*(wheels.glob("cu*/bin") if wheels else []), Path(sys.executable).parent]
    path = os.pathsep.join([*map(str, homes), *os.get_exec_path()])
    nvcc, ninja = (shutil.which(name, path=path) for name in ("nvcc", "ninja"))
    torch = package_folder("torch")
    if sys.platform != "linux" or not nvcc or not ninja:
        return "they need Linux, ninja, and nvcc in CUDA_HOME, on PATH or in nvidia-cuda-nvcc"
    if not torch or not (torch / "include/torch/csrc/stable/ops.h").exists():
        return "they need the headers of torch >= 2.10, which is not installed here"
    cuda = Path(nvcc).parents[1]
    archs, kinds = arch_flags()
    lines = [NINJA.format(nvcc=nvcc, csrc=CSRC, torch=torch, cuda=cuda, archs=archs, kinds=kinds)]
    rows = re.findall(r"#define (LDM_\w*)S\(X\)((?:.*\\\n)*.*)", (CSRC / "dispatch.h").read_text())
    objects = []
    for source in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cpp")]):
        text = source.read_text() if source.suffix == ".cu" else ""
        macros = [f"{name}={dim}" for name, dims in rows if re.search(rf"\b{name}\b", text)
                  for dim in reversed(re.findall(r"\d+", dims))]  # fmt: skip
        for macro in macros or [""]:
            dim = "_" + macro.split("=")[1] if macro else ""
            objects.append(f"{source.relative_to(CSRC).with_suffix('')}{dim}.o")
            lines += [f"build {objects[-1]}: compile {source}"]
            lines += [f"  defines = -D{macro}"] if macro else []
    BUILD.mkdir(parents=True, exist_ok=True)
    lines += [f"build _C.so: link {' '.join(objects)}", ""]
    (BUILD / "build.ninja").write_text("\n".join(lines))
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    failed = subprocess.run([ninja, "-C", str(BUILD), *jobs]).returncode
    return "ninja failed, and says why above (pip install -v shows it)" if failed else None


class BuildKernels(build_ext):
    built = False

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in it

    def build_extension(self, ext: Extension) -> None:
        if reason := build_library():
            if MODE == "1":
                sys.exit(f"LDM4TS_BUILD_CUDA=1, but the kernels cannot be built: {reason}")
            print(f"ldm4ts-kernels: pure Python, without compiled kernels: {reason}")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(BUILD / "_C.so", target)
        BuildKernels.built = True


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if BuildKernels.built else "any"


MODE = os.environ.get("LDM4TS_BUILD_CUDA", "auto")
if MODE not in ("auto", "1", "0"):
    sys.exit(f"LDM4TS_BUILD_CUDA must be auto, 1 or 0, got {MODE!r}")
if MODE == "0":
    print("ldm4ts-kernels: pure Python, without compiled kernels: LDM4TS_BUILD_CUDA=0")
setup(
    ext_modules=[] if MODE == "0" else [Extension("ldm4ts_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
