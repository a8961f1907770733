"""setup.py's choices, without compiling; and, where the library is built, what is inside it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ldm4ts_kernels import native

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# Pythons with another torch, os.pathsep between them.
PYTHONS = [sys.executable, *filter(None, os.environ.get("OTHER_PYTHONS", "").split(os.pathsep))]
LOAD = """
import torch
from ldm4ts_kernels import native
assert native.load_error() is None, native.load_error()
aten = "aten::_scaled_dot_product_fused_attention_overrideable"
own = "ldm4ts_kernels::flash_"
for name in (own + "forward", own + "backward", aten, aten + "_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
"""
needs_library = pytest.mark.skipif(
    not native.LIBRARY.exists(), reason="the compiled extension is not built here"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what a source distribution holds, without anything built."""
    folder = tmp_path_factory.mktemp("project")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / name)
    for name in ("csrc", "ldm4ts_kernels"):
        skip = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    return folder


def set_up(project: Path, *arguments: str, path: str = "", **environment: str):
    """Run setup.py with nothing but `path` on PATH."""
    kept = {name: value for name, value in os.environ.items() if "CUDA" not in name}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=project,
        env={**kept, "PATH": path or os.defpath, **environment},
        capture_output=True,
        text=True,
    )


def hide_programs(folder: Path) -> str:
    """Return a PATH on which there is no compiler."""
    folder.mkdir(exist_ok=True)
    return str(folder)


@pytest.mark.parametrize("mode", ["0", "auto"])
def test_a_machine_without_nvcc_gets_a_pure_wheel_and_the_reason(project, tmp_path, mode):
    if importlib.util.find_spec("nvidia") and mode == "auto":
        pytest.skip("this environment may hold nvcc's wheel")
    path = hide_programs(tmp_path / "bin")
    ran = set_up(project, "bdist_wheel", "-d", str(tmp_path), path=path, LDM4TS_BUILD_CUDA=mode)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stdout.splitlines() if "without compiled kernels" in line]
    assert len(said) == 1
    assert ("LDM4TS_BUILD_CUDA=0" if mode == "0" else "nvcc") in said[0]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "ldm4ts_kernels/native.py" in names
    assert not [name for name in names if name.endswith(".so") or name.startswith("csrc")]


def test_a_build_that_must_succeed_fails_with_the_reason(project, tmp_path):
    if importlib.util.find_spec("nvidia"):
        pytest.skip("this environment may hold nvcc's wheel")
    path = hide_programs(tmp_path / "bin")
    ran = set_up(project, "build_ext", "-b", str(tmp_path), path=path, LDM4TS_BUILD_CUDA="1")
    assert ran.returncode != 0
    assert "cannot be built: they need Linux, ninja, and nvcc" in ran.stderr


def fake_nvcc(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "nvcc").chmod(0o755)
    return os.pathsep.join([str(folder), os.defpath])


@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on PATH")
@pytest.mark.parametrize(("mode", "code"), [("auto", 0), ("1", 1)])
def test_a_failing_compiler_is_an_error_only_where_kernels_must_be_built(
    project, tmp_path, mode, code
):
    path = fake_nvcc(tmp_path / "bin", "exit 3")
    ran = set_up(project, "build_ext", "-b", str(tmp_path), path=path, LDM4TS_BUILD_CUDA=mode)
    assert ran.returncode == code
    assert "ninja failed" in ran.stdout + ran.stderr
    assert not list(tmp_path.rglob("_C.so"))


@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on PATH")
def test_every_kernel_is_compiled_once_a_head_dim_for_the_chosen_architectures(project, tmp_path):
    # the last argument of `-o OUT` must exist for ninja to go on
    text = f'echo "$@" >> {tmp_path}/calls; while [ "$1" != -o ]; do shift; done; : > "$2"'
    path = fake_nvcc(tmp_path / "bin", text)
    ran = set_up(
        project, "build_ext", "-b", str(tmp_path), path=path, LDM4TS_CUDA_ARCHS="8.6;90a+PTX"
    )
    assert ran.returncode == 0, ran.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    exact, int8 = (
        re.findall(r"X\((\d+)\)", text)
        for text in (ROOT / "csrc/dispatch.h").read_text().split("#define LDM_INT8_HEAD_DIMS")
    )
    # forward and backward; INT8; the other three .cu, ops.cpp and the link
    assert len(calls) == 2 * len(exact) + len(int8) + 5
    codes = "arch=compute_86,code=[sm_86,sm_90a,compute_86]"
    assert all(codes in call for call in calls[:-1])
    assert all("-DLDM_SHARED_KINDS=7" in call for call in calls[:-1])
    defined = {f"-DLDM_HEAD_DIM={dim}" for dim in exact}
    defined |= {f"-DLDM_INT8_HEAD_DIM={dim}" for dim in int8}
    assert defined <= set(" ".join(calls).split())


@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on PATH")
@pytest.mark.parametrize(
    ("archs", "kinds"),
    [("8.6", 1), ("80", 3), ("90", 4), ("8.9;9.0", 5), ("10.0", 7), ("86+PTX", 7)],
)
def test_tiles_are_compiled_for_the_gpus_that_a_build_is_for(project, tmp_path, archs, kinds):
    path = fake_nvcc(tmp_path / "bin", f'echo "$@" >> {tmp_path}/calls; exit 3')
    set_up(project, "build_ext", "-b", str(tmp_path), path=path, LDM4TS_CUDA_ARCHS=archs)
    assert f"-DLDM_SHARED_KINDS={kinds} " in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("LDM4TS_BUILD_CUDA", "yes", "LDM4TS_BUILD_CUDA must be auto, 1 or 0, got 'yes'"),
        ("LDM4TS_CUDA_ARCHS", "hopper", "from 80 on, got 'hopper'"),
        ("TORCH_CUDA_ARCH_LIST", "7.5;8.0", "from 80 on, got '7.5'"),
    ],
)
def test_a_setting_that_means_nothing_is_named(project, tmp_path, name, value, wanted):
    path = fake_nvcc(tmp_path / "bin", "exit 3")
    ran = set_up(project, "build_ext", "-b", str(tmp_path), path=path, **{name: value})
    assert ran.returncode != 0
    assert wanted in ran.stderr


def test_no_source_that_nvcc_compiles_includes_torch():
    for source in (ROOT / "csrc").rglob("*.cu*"):
        assert "torch" not in re.sub(r"//.*", "", source.read_text()), source


# ---- what is in the library


def symbols(*options: str) -> list[str]:
    command = ["nm", "-D", *options, str(native.LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@needs_library
def test_the_library_needs_nothing_of_cuda_or_python_at_load_time():
    command = ["readelf", "-d", str(native.LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", text))
    assert needed <= {"libtorch", "libstdc++", "libgcc_s", "libc", "libm", "ld-linux-x86-64"}
    assert not [line for line in symbols("--undefined-only") if " Py" in line or " _Py" in line]


@needs_library
def test_of_torch_it_uses_the_stable_c_functions_alone_and_the_cuda_one_weakly():
    undefined = [line.split() for line in symbols("--undefined-only")]
    torchs = {
        name.split("@")[0]: kind for kind, name in undefined if "torch" in name or "c10" in name
    }
    assert torchs.pop("aoti_torch_get_current_cuda_stream") == "w"
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in torchs), torchs


@needs_library
@pytest.mark.parametrize("python", PYTHONS)
def test_one_library_loads_in_every_torch(python):
    command = [python, "-c", LOAD]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


@pytest.fixture(scope="module")
def resources():
    spec = importlib.util.spec_from_file_location("resources", ROOT / "csrc/resources.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["resources"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@needs_library
def test_no_kernel_spills_and_each_fits_every_gpu_it_serves(resources):
    if shutil.which("cuobjdump") is None and importlib.util.find_spec("triton") is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed triton")
    found = resources.kernels(native.LIBRARY)
    head_dims = {0, *resources.HEAD_DIMS, resources.LARGE_HEAD_DIM}
    assert {kernel.head_dim for kernel in found} == head_dims
    for kernel in found:
        joint = kernel.name == "flash_bwd_kernel" and "(Shape)4" in kernel.tiles
        paired = kernel.name == "flash_bwd_kernel" and "(Shape)6" in kernel.tiles
        wide = kernel.name == "flash_fwd_kernel" and re.search(r"\(Shape\)[06]", kernel.tiles)
        # pointers, read once a stage; of a joint block, once a step; of paired warps, once a head
        assert kernel.stack_bytes <= (48 if joint or paired else 24 if wide else 0), kernel
        for capability in (80, 90) if wide or joint else (80, 86, 89, 90):  # narrow ones serve
            assert kernel.shared_bytes <= resources.SHARED_A_BLOCK[capability] * 1024, kernel
            assert kernel.blocks(capability) >= 1, kernel
