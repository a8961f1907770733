"""The kernels as Hugging Face's `kernels` library loads them, without this package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("kernels", reason="needs Hugging Face's kernels")
pytest.importorskip("triton", reason="needs triton")

from ldm4ts_kernels import attention_fn
from tests.cases import Shape, draw

ROOT = Path(__file__).parents[1]
BACKEND = "cuda" if torch.version.cuda else "cpu"
ALONE = """
import sys
from pathlib import Path
sys.modules["ldm4ts_kernels"] = None
import kernels, torch
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
device = "cuda" if torch.cuda.is_available() else "cpu"
query = torch.randn(1, 9, 2, 16, device=device, requires_grad=True)
kernel.flash_attn_func(query, query, query, causal=True).sum().backward()
print(sorted(kernel.__all__), query.grad.isfinite().all().item())
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Assemble the build variant of this machine, as a user does from a clone."""
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, ROOT / "torch-ext" / "assemble.py", "--backend", BACKEND]
    subprocess.run([*command, "--output", folder / "build"], check=True)
    return folder


def test_the_build_file_is_one_that_the_library_reads():
    from kernels._rust import Build

    assert [str(backend) for backend in Build.open(ROOT).general.backends] == ["cuda"]


def test_it_loads_in_a_process_that_has_no_such_package(build):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(build)],
        capture_output=True, text=True, env=environment, cwd=build,
    )  # fmt: skip
    names = ["flash_attention", "flash_attn_func", "int8_attention"]
    assert done.stdout.strip() == f"{names} True", done.stderr


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flash_attention", {"backend": "triton"}),
        ("int8_attention", {"precision": "int8", "backend": "triton_int8"}),
    ],
)
def test_beside_the_package_it_computes_what_the_package_computes(build, device, name, options):
    kernel = kernels.get_local_kernel(build)
    tensors = draw(Shape(1, 2, 1, 9, 33, 16), torch.float16, device)
    results = []
    for attend in (
        getattr(kernel, name),
        lambda *qkv: attention_fn(*qkv, enable_gqa=True, **options),
    ):
        out = attend(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_the_wheels_layout_and_causal_mask_are_those_of_flash_attn(build, device):
    kernel = kernels.get_local_kernel(build)
    query, key, value = draw(Shape(1, 2, 2, 3, 5, 16), torch.float32, device)
    ours = kernel.flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value)), causal=True)
    mask = torch.ones(3, 5, dtype=torch.bool, device=device).tril(2)
    torch.testing.assert_close(
        ours.transpose(1, 2),
        attention_fn(query, key, value, mask, backend="sdpa"),
        rtol=1e-3,
        atol=1e-5,
    )
