"""Fresh processes: the package works with each optional library missing, or there but broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = ("triton", "sageattention", "flash_attn", "xformers", "diffusers", "transformers")
# How a wheel breaks, and what it then prints: each a different failure, deep inside the package.
BROKEN = {
    "raise ImportError('libcudart.so.11.0: cannot open shared object file')": "libcudart.so.11.0",
    "raise OSError('undefined symbol: _ZN3c104cuda')": "undefined symbol",
    "raise ImportError('undefined symbol: _ZNK3c105Error4whatEv (another torch)')": "another torch",
    "import a_module_that_nobody_has": "a_module_that_nobody_has",
    "from math import nothing_of_this_name": "nothing_of_this_name",
    "import ctypes; ctypes.CDLL('lib_of_another_cuda.so')": "lib_of_another_cuda",
}
ATTEND = """
import torch
from ldm4ts_kernels import attention_fn, explain
query = torch.randn(1, 2, 5, 64, dtype=torch.bfloat16)
for precision in ("exact", "int8"):
    assert attention_fn(query, query, query, precision=precision).shape == query.shape
    print(explain(query, query, query, precision=precision))
"""


def run(code: str, *, path: Path | None = None, check: bool = True) -> str:
    """Run code in a fresh interpreter, with `path` before all others on sys.path."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (path, ROOT))))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert not check or result.returncode == 0, result.stderr
    return result.stdout


def break_wheel(folder: Path, name: str, statement: str) -> None:
    """Write a package that fails when its inner module is imported."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(f"from {name}._inner import kernel\n")
    (package / "_inner.py").write_text(f"{statement}\n")


def test_import_needs_torch_alone_and_touches_no_gpu():
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import torch
import ldm4ts_kernels
assert not torch.cuda.is_initialized()
{ATTEND}
"""
    assert "sdpa serves" in run(code)


def test_import_loads_no_optional_library():
    code = f"""
import sys
import ldm4ts_kernels
print([name for name in ({OPTIONAL!r} + ("torch._dynamo",)) if name in sys.modules])
"""
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("statement", BROKEN)
def test_a_broken_wheel_is_a_reason_not_a_crash(statement, tmp_path):
    for wheel in ("flash_attn", "sageattention"):
        break_wheel(tmp_path, wheel, statement)
    explained = run(ATTEND, path=tmp_path)
    assert "flash_attn does not import" in explained
    assert "sageattention does not import" in explained
    assert explained.count(BROKEN[statement]) >= 2


def test_a_flash_attn4_without_its_compiler_is_a_reason_not_a_crash(tmp_path):
    (tmp_path / "flash_attn").mkdir()  # the wheel puts no __init__.py here
    (tmp_path / "flash_attn" / "cute").mkdir()
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("import cutlass.cute\n")
    lines = {line.split()[0]: line for line in run(ATTEND, path=tmp_path).splitlines() if line}
    assert "flash_attn.cute does not import: No module named 'cutlass" in lines["flash_attn4"]
    assert "needs flash_attn 2.x, found 0" in lines["flash_attn"]


def test_a_broken_triton_is_a_reason_not_a_crash(tmp_path):
    break_wheel(tmp_path, "triton", "raise ImportError('libtriton.so: wrong architecture')")
    assert "libtriton.so: wrong architecture" in run(ATTEND, path=tmp_path)


def test_an_error_of_another_kind_inside_a_wheel_is_not_swallowed(tmp_path):
    break_wheel(tmp_path, "flash_attn", "raise ZeroDivisionError('a bug, not an installation')")
    assert run(ATTEND, path=tmp_path, check=False) == ""


@pytest.mark.parametrize(
    ("found", "name", "reason"),
    [
        ("1.0.6", "sageattention2", "needs sageattention 2.x, found 1.0.6"),
        ("2.2.0", "sageattention", "needs sageattention 1.x, found 2.2.0"),
    ],
)
def test_a_wheel_of_another_version_is_a_reason(found, name, reason, tmp_path):
    package = tmp_path / "sageattention"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = {found!r}\n")
    lines = run(ATTEND, path=tmp_path).splitlines()
    assert any(line.split()[0] == name and reason in line for line in lines if line.strip())
