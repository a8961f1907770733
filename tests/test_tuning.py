"""The tiles of the Triton kernels, compiled for GPUs that are not here."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.resources import SHARED_LIMIT_KIB
from ldm4ts_kernels.kernels import tuning

ROOT = Path(__file__).parents[1]
STAGES = tuple(tuning.TABLES)


def test_a_head_dim_is_covered_by_two_powers_of_two():
    for head_dim in range(1, 257):
        first, second = tuning.split_head_dim(head_dim)
        assert first + second >= head_dim
        assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in (first, second))


def test_the_head_dims_of_diffusion_models_are_not_padded_to_the_next_power_of_two():
    covered = {dim: sum(tuning.split_head_dim(dim)) for dim in (40, 48, 80, 96, 160)}
    assert covered == {40: 48, 48: 48, 80: 80, 96: 96, 160: 160}
    hopper = {dim: sum(tuning.split_head_dim(dim, (9, 0))) for dim in (40, 80, 96, 160)}
    assert hopper == {40: 64, 80: 80, 96: 96, 160: 160}


@pytest.mark.parametrize("capability", SHARED_LIMIT_KIB)
@pytest.mark.parametrize("stage", STAGES)
def test_every_head_dim_length_and_dtype_has_a_tile(stage, capability):
    for head_dim in range(1, 257):
        for itemsize in (2, 4):
            for key_length in (1, 77, 256, 100_000):
                config = tuning.choose(stage, head_dim, itemsize, key_length, capability)
                assert config.block_q >= 16
                assert config.block_k >= 16


@pytest.mark.parametrize("stage", tuning.TMA)
def test_tensor_maps_serve_long_rows_alone(stage):
    assert tuning.choose_tma(stage, 16, 4096, True, True) is None
    assert tuning.choose_tma("one_block", 64, 4096, True, True) is None
    for head_dim in range(tuning.TMA_HEAD_DIM, 161):
        config = tuning.choose_tma(stage, head_dim, 4096, True, True)
        assert config is None or config.tma


@pytest.mark.parametrize("stage", tuning.TMA_PLAIN)
@pytest.mark.parametrize(("plain", "bfloat16"), [(True, True), (True, False), (False, True)])
def test_a_maximum_is_kept_in_bfloat16_alone(stage, plain, bfloat16):
    for head_dim, key_length in itertools.product(range(1, 257), (600, 4096, 4097)):
        config = tuning.choose_tma(stage, head_dim, key_length, plain, bfloat16)
        assert config is None or not config.steady or (plain and bfloat16)


def test_one_block_tiles_hold_all_keys():
    for head_dim in range(1, 257):
        for key_length in range(1, 129):
            if tuning.fits_one_block(head_dim, 2, key_length, (8, 6)):
                config = tuning.choose("one_block", head_dim, 2, key_length, (8, 6))
                assert config.block_k >= key_length


@pytest.mark.parametrize(("capability", "head_dim"), [("86", "128"), ("90", "40")])
def test_kernels_compile_for_a_gpu_that_is_not_here_within_its_shared_memory(
    capability, head_dim, tmp_path
):
    table = tmp_path / "resources.csv"
    command = [sys.executable, "-m", "benchmarks.resources", "--output", str(table)]
    command += ["--capability", capability, "--head-dim", head_dim]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(table.open()))
    assert {row["kernel"] for row in rows} >= {"flash_fwd_kernel", "flash_dkdv_kernel"}
    assert all(float(row["shared_kib"]) <= float(row["shared_limit_kib"]) for row in rows)


PTX = """
from benchmarks.resources import compile_launch, launch_exact, problem_of, record_launches, retarget
for capability in ((8, 6), (8, 9)):
    problem = problem_of(64, 4096)._replace(capability=capability)
    launches = list(record_launches(launch_exact, problem))
    print(*(retarget(compile_launch(*it, capability).asm["ptx"], (8, 9)) for it in launches))
    print("====")
"""


def test_triton_writes_the_same_code_for_an_ada_gpu_as_for_a_small_ampere():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", PTX]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ampere, ada, _ = (text.strip() for text in result.stdout.split("===="))
    assert "mma.sync" in ampere
    assert ampere == ada
