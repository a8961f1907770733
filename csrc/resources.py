"""Prints what every compiled kernel takes of a GPU, as the table in docs/kernels.md.

    python csrc/resources.py ldm4ts_kernels/_C.so

Registers and spills are read from the machine code (cuobjdump), threads and shared memory from
csrc/sm80/tiles.h; both need no GPU. Blocks an SM follow from the four limits below.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent
DISPATCH = (CSRC / "dispatch.h").read_text()
HEAD_DIMS = sorted({int(dim) for dim in re.findall(r"X\((\d+)\)", DISPATCH)})
LARGE_HEAD_DIM = int(re.findall(r"kMaxFwdHeadDim = (\d+)", DISPATCH)[0])
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
SHAPES = dict(enumerate(("wide", "narrow", "few keys", "general", "joint", "one warp", "paired")))
SHARED_AN_SM = {80: 164, 86: 100, 89: 100, 90: 228}  # KiB, 1 of them the system's for each block
SHARED_A_BLOCK = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB
WARPS_AN_SM = {80: 64, 86: 48, 89: 48, 90: 64}
REGISTERS_AN_SM = 65536
TILES = """
#include <cstdio>
#include "sm80/int8_tiles.h"
using namespace ldm;
template <class T> void show(const char* name, const char* rest, int rank = 0) {
  std::printf("%s<%d%s, %d> %d %d\\n", name, T::kHeadDim, rest, rank, T::kThreads, T::kSharedBytes);
}
template <int kDim, int kRank = 0> void show_wide() {
  if constexpr (kRank < kWideFwdRows<kDim>) {
    show<FwdTiles<kDim, Shape::kWide, kRank>>("FwdTiles", ", (Shape)0", kRank);
    show_wide<kDim, kRank + 1>();
  }
}
template <int kDim, int kRank = 0> void show_joint() {
  if constexpr (kRank < kJointBwdRows<kDim>) {
    show<BwdTiles<kDim, Shape::kJoint, kRank>>("BwdTiles", ", (Shape)4", kRank);
    show_joint<kDim, kRank + 1>();
  }
}
template <int kDim> void show_all() {
  show_wide<kDim>();
  show<FwdTiles<kDim, Shape::kNarrow>>("FwdTiles", ", (Shape)1");
  if constexpr (kHasOneWarpFwd<kDim>) {
    show<FwdTiles<kDim, Shape::kOneWarp>>("FwdTiles", ", (Shape)5");
  }
  if constexpr (kHasFewFwd<kDim>) show<FwdTiles<kDim, Shape::kFew>>("FwdTiles", ", (Shape)2");
  if constexpr (kHasWideBwd<kDim>) show<BwdTiles<kDim, Shape::kWide>>("BwdTiles", ", (Shape)0");
  if constexpr (kHasPairedBwd<kDim>) show<BwdTiles<kDim, Shape::kPaired>>("BwdTiles", ", (Shape)6");
  using Narrow = BwdTiles<kDim, Shape::kNarrow>;
  show<Narrow>("BwdTiles", ", (Shape)1");
  show_joint<kDim>();
  std::printf("finish BwdTiles<%d, (Shape)1, 0> %d %d\\n", kDim, kFinishedRows * 2,
              kFinishedRows * Narrow::kPadded * 2);
  show<BwdTiles<kDim, Shape::kGeneral>>("BwdTiles", ", (Shape)3");
  if constexpr (kHasInt8<kDim>) {
    std::printf("Int8Tiles<%d> %d %d\\n", kDim, Int8Tiles<kDim>::kThreads,
                Int8Tiles<kDim>::kSharedBytes);
  }
}
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code for one architecture."""

    name: str  # as in the sources
    tiles: str  # its tile's type
    element: str
    general: bool
    arch: int
    registers: int
    stack_bytes: int  # spills and local arrays
    threads: int
    shared_bytes: int

    @property
    def head_dim(self) -> int:
        return int(re.findall(r"<(\d+)|$", self.tiles)[0] or 0)  # 0: the quantiser's, for any

    def blocks(self, capability: int) -> int:
        """Return how many blocks of this kernel an SM of `capability` holds."""
        warps = self.threads // 32
        registers = REGISTERS_AN_SM // (warps * -(-self.registers * 32 // 256) * 256)
        shared = SHARED_AN_SM[capability] * 1024 // (self.shared_bytes + 1024)
        return min(registers, shared, WARPS_AN_SM[capability] // warps)


def tile_sizes() -> dict[str, tuple[int, int]]:
    """Return threads and bytes of shared memory by tile type, as the compiler computes them."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "tiles.cpp"), Path(folder, "tiles")
        source.write_text(
            TILES
            + 'int main() { std::printf("Rows %d %d\\n", kQuantThreads, kQuantBytes); '
            + 'std::printf("Splits %d 0\\n", kCombineThreads); '
            + f"using Large = LargeTiles<{LARGE_HEAD_DIM}>; "
            + f'std::printf("LargeTiles<{LARGE_HEAD_DIM}> %d %d\\n", Large::kThreads, '
            + "Large::kSharedBytes); "
            + " ".join(f"show_all<{dim}>();" for dim in HEAD_DIMS)
            + " }"
        )
        command = ["g++", "-std=c++17", f"-I{CSRC}", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = [line.rsplit(" ", 2) for line in lines.splitlines()]
    return {tiles: (int(threads), int(shared)) for tiles, threads, shared in found}


def find_cuobjdump() -> str:
    """Return CUDA's cuobjdump, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    bundled = [f"{triton.submodule_search_locations[0]}/backends/nvidia/bin"] if triton else []
    found = shutil.which("cuobjdump", path=os.pathsep.join([*os.get_exec_path(), *bundled]))
    if not found:
        raise FileNotFoundError("cuobjdump is neither on PATH nor part of an installed triton")
    return found


def kernels(library: Path) -> list[Kernel]:
    """Return every attention kernel in a compiled library."""
    command = [find_cuobjdump(), "-res-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout
    sizes, found, arch = tile_sizes(), [], 0
    for line in text.replace("ldm::", "").splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        kernel = r"((?:flash|int8)_\w+)<(\w+)(?:, (\w+<[^>]*>))?(?:, (\w+))?\s*>"
        if match := re.search(kernel, line):
            name, element, tiles, general = match.groups("")
            tiles = tiles or ("Splits" if "combine" in name else "Rows")
        if match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            resident = "statistics" in name or "round" in name  # nothing in shared memory
            threads, shared = sizes[tiles]
            if "finish" in name:
                threads, shared = sizes[f"finish {tiles}"]
            found.append(
                Kernel(
                    name, tiles, element, general == "true" or "large" in name, arch,
                    int(match[1]), int(match[2]), threads, 0 if resident else shared,
                )
            )  # fmt: skip
    return found


def named(tiles: str) -> str:
    """Return a tile's type with the name of its shape."""
    for number, name in SHAPES.items():
        tiles = tiles.replace(f"(Shape){number}", name)
    return tiles.replace(", 0>", ">")  # the first of its rows


def table(found: list[Kernel]) -> str:
    """Return the kernels as Markdown, float16 and bfloat16 in one row: the larger of the two."""
    rows: dict[tuple, list[Kernel]] = {}
    for kernel in sorted(found, key=lambda k: (k.name, k.head_dim, k.tiles, k.general)):
        rows.setdefault((kernel.name, kernel.tiles, kernel.general), []).append(kernel)
    archs = sorted({kernel.arch for kernel in found})
    lines = [
        f"| kernel | tiles | masks, dropout | threads | shared KiB | registers, {archs} | stack | "
        f"blocks an SM on {list(SHARED_AN_SM)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, tiles, general), group in rows.items():
        code = {
            arch: max((k for k in group if k.arch == arch), key=lambda k: k.registers)
            for arch in archs
        }
        # a GPU runs the machine code of the latest architecture that is not later than its own
        serving = {to: code[max(a for a in archs if a <= to)] for to in SHARED_AN_SM}
        lines.append(
            f"| {name.removesuffix('_kernel')} | {named(tiles)} | {'yes' if general else 'no'} "
            f"| {group[0].threads} | {group[0].shared_bytes / 1024:.1f} "
            f"| {' '.join(str(k.registers) for k in code.values())} "
            f"| {max(k.stack_bytes for k in group)} "
            f"| {' '.join(str(k.blocks(to)) for to, k in serving.items())} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(kernels(Path(sys.argv[1]))) + "\n")
