"""Builds the compiled extension where nvcc, ninja and torch's headers are; else pure Python.

One shared library on LibTorch's stable ABI, without a line of Python C API, so that one wheel
serves every Python and every torch ≥ 2.10. Environment:
    LDM4TS_BUILD_CUDA   auto (default), 1 (a failed build is an error) or 0 (pure Python)
    LDM4TS_CUDA_ARCHS   such as "80;90+PTX"; else TORCH_CUDA_ARCH_LIST; else DEFAULT_ARCHS
    MAX_JOBS            compilers at once
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
CSRC = ROOT / "csrc"
# sm_80's machine code also runs on 8.6 and 8.9; its PTX, on what comes later.
DEFAULT_ARCHS = "80+PTX;90"
STABLE_ABI = "0x020a000000000000"  # of torch 2.10
# nvcc drives g++ for ops.cpp and for the link; it compiles no file that includes torch.
NINJA = """\
rule compile
  command = {nvcc} -O3 -std=c++17 -I{csrc} {include} --expt-relaxed-constexpr {archs} $
      --compress-mode=size -diag-suppress 177 -DTORCH_TARGET_VERSION={abi} $defines $
      -Xcompiler -fPIC,-fvisibility=hidden -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = {nvcc} -shared -cudart static $in -o $out {libraries} $
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


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    wheels = package_folder("nvidia")
    folders = [Path(home, "bin") for home in homes] + os.get_exec_path()
    folders += sorted(wheels.glob("cu*/bin"), reverse=True) if wheels else []
    return shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))


def arch_flags() -> str:
    chosen = os.environ.get("LDM4TS_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    flags = []
    for arch in re.split(r"[;,\s]+", (chosen or DEFAULT_ARCHS).strip("; ")):
        match = re.fullmatch(r"(\d+)\.?(\d+[af]?)(\+PTX)?", arch)
        if not match or int(match[1] + match[2].rstrip("af")) < 80:
            sys.exit(f"LDM4TS_CUDA_ARCHS must list architectures from 80 on, got {arch!r}")
        number = match[1] + match[2]
        codes = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags.append(f"-gencode arch=compute_{number},code={codes}")
    return " ".join(flags)


def write_ninja(folder: Path, nvcc: str, torch: Path) -> None:
    head_dims = re.findall(r"X\((\d+)\)", (CSRC / "dispatch.h").read_text())
    rules = NINJA.format(
        nvcc=nvcc, csrc=CSRC, include=f"-isystem {torch / 'include'}", archs=arch_flags(),
        abi=STABLE_ABI, libraries=f"-L{torch / 'lib'} -L{Path(nvcc).parents[1] / 'lib'}",
    )  # fmt: skip
    objects, lines = [], [rules]
    for source in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cpp")]):
        per_dim = source.suffix == ".cu" and "LDM_HEAD_DIM" in source.read_text()
        for dim in reversed(head_dims) if per_dim else [""]:
            objects.append(f"{source.relative_to(CSRC).with_suffix('')}{dim and '_'}{dim}.o")
            lines.append(f"build {objects[-1]}: compile {source}")
            lines += [f"  defines = -DLDM_HEAD_DIM={dim}"] if dim else []
    lines.append(f"build _C.so: link {' '.join(objects)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))


def build(folder: Path) -> str | None:
    """Build folder/_C.so, as far as anything changed; return the reason where that cannot be."""
    nvcc, torch = find_nvcc(), package_folder("torch")
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    ninja = shutil.which("ninja", path=beside_python)
    if sys.platform != "linux":
        return f"the kernels build on Linux, this is {sys.platform}"
    if not nvcc:
        return "no nvcc in CUDA_HOME, on PATH or in nvidia-cuda-nvcc's wheel"
    if not torch or not (torch / "include/torch/csrc/stable/library.h").exists():
        return "no torch >= 2.10 in this environment (or pass --no-build-isolation)"
    if not ninja:
        return "no ninja"
    write_ninja(folder, nvcc, torch)
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    failed = subprocess.run([ninja, "-C", str(folder), *jobs]).returncode
    return f"ninja ended with {failed}; its output says why" if failed else None


class BuildCuda(build_ext):
    """A plain shared library: no Python in its name, none in its symbols."""

    built = False

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / "native"
        reason = build(folder)
        if reason and MODE == "1":
            sys.exit(f"LDM4TS_BUILD_CUDA=1, but the kernels were not built: {reason}")
        if reason:
            print(f"ldm4ts-kernels: pure Python, without the compiled kernels: {reason}")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "_C.so", target)
        BuildCuda.built = True

    def copy_extensions_to_source(self) -> None:
        if BuildCuda.built:
            super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Tagged py3-none: for this platform with the library, for any without it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if BuildCuda.built else "any"


MODE = os.environ.get("LDM4TS_BUILD_CUDA", "auto")
if MODE not in ("auto", "1", "0"):
    sys.exit(f"LDM4TS_BUILD_CUDA must be auto, 1 or 0, got {MODE!r}")
if MODE == "0":
    print("ldm4ts-kernels: pure Python, without the compiled kernels: LDM4TS_BUILD_CUDA=0")
setup(
    ext_modules=[] if MODE == "0" else [Extension("ldm4ts_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildCuda, "bdist_wheel": Wheel},
)
