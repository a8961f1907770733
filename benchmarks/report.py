"""Write the pages' tables from results/*.csv, between their markers: python -m benchmarks.report

`<!-- table: NAME -->` opens a table and `<!-- end -->` closes it; what stands between is replaced.
With --check nothing is written, and a table that differs is an error.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import training_tables
from benchmarks.measure import RESULTS, Rows, read, source

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PEERS = {"sdpa flash": "FlashAttention-2", "sdpa cudnn": "cuDNN", "flex": "FlexAttention"}
OWN = ("native", "triton")  # our exact kernels
FLASH = "sdpa flash"
EXACT_PEERS = (FLASH, "sdpa cudnn", "sdpa efficient", "flex")


def kept_activations(rows: Rows) -> list[str]:
    """One line an image size: activations kept, attention by attention."""
    cells = {(row["px"], row["attention"], row["checkpointing"]): row["kept_mib"] for row in rows}
    lines = [
        "| image | default attention | ours | saved | default, checkpointed | ours, checkpointed |",
        "|---|---|---|---|---|---|",
    ]
    for px in dict.fromkeys(row["px"] for row in rows):
        default, ours = (float(cells[px, name, "kept"]) for name in ("default", "flash"))
        recomputed = [float(cells[px, name, "checkpointed"]) for name in ("default", "flash")]
        lines.append(
            f"| {px} px | {default:,.0f} MiB | **{ours:,.0f} MiB** | {1 - ours / default:.0%} | "
            f"{recomputed[0]:,.0f} MiB | {recomputed[1]:,.0f} MiB |"
        )
    return [*lines, "", source(rows)]


def device_times(rows: Rows) -> dict[tuple[str, str, str], str]:
    """Return the device ms of each (shape, backend, pass); empty where the backend refused."""
    return {(row["shape"], row["backend"], row["pass"]): row["device_ms"] for row in rows}


def attention_speed(rows: Rows) -> list[str]:
    """One line a shape: device ms of both passes by backend, and FlashAttention-2 ÷ ours."""
    times = device_times(rows)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = [
        name
        for name in dict.fromkeys(row["backend"] for row in rows)
        if any(times.get((shape, name, "forward")) for shape in shapes)
    ]
    lines = [f"| B, H, N_q, N_k, D | {' | '.join(names)} | FA2 ÷ triton | FA2 ÷ native |"]
    lines += ["|---" * (len(names) + 3) + "|"]
    passes = ("forward", "forward+backward")
    for shape in shapes:
        cells = [[times.get((shape, name, each)) or "–" for each in passes] for name in names]
        texts = [" / ".join(cell) for cell in cells]
        flash = cells[names.index("sdpa flash")]
        ratios = []
        for name in ("triton", "native"):
            ours = cells[names.index(name)] if name in names else ["–", "–"]
            ratios.append(" / ".join(map(_ratio, flash, ours)))
        lines.append(f"| {' | '.join([shape, *texts, *ratios])} |")
    return [*lines, "", source(rows)]


def _ratio(theirs: str, ours: str) -> str:
    return "–" if "–" in (theirs, ours) else f"{float(theirs) / float(ours):.2f}"


def attention_gains(rows: Rows) -> list[str]:
    """One line a shape: how many times faster our faster exact kernel is than each peer."""
    times = device_times(rows)
    lines = [f"| B, H, N_q, N_k, D | ours | {' | '.join(PEERS.values())} |"]
    lines += ["|---" * (len(PEERS) + 2) + "|"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        ratios: dict[str, list[str]] = {peer: [] for peer in PEERS}
        winners = []
        for each in ("forward", "forward+backward"):
            ours = min(OWN, key=lambda name: float(times[shape, name, each]))
            winners.append(ours)
            for peer in PEERS:
                ratios[peer].append(_ratio(times[shape, peer, each], times[shape, ours, each]))
        served = " / ".join(winners)
        cells = [f"{' / '.join(found)} ×" for found in ratios.values()]
        lines.append(f"| {' | '.join([shape.replace('x', ', '), served, *cells])} |")
    return [*lines, "", source(rows)]


def native_speed(rows: Rows) -> list[str]:
    """One line a shape: the compiled kernels, FlashAttention-2 and, of more peers, the best."""
    times = device_times(rows)
    others = {row["backend"] for row in rows} & set(EXACT_PEERS) - {FLASH}
    heads = ["B, H, N_q, N_k, D", "FlashAttention-2", "native", "FA2 ÷ native"]
    if others:
        heads[2:] = ["best exact peer", "native", "FA2 ÷ native", "best peer ÷ native"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        cells: list[list[str]] = [[] for _ in heads[1:]]
        for each in ("forward", "forward+backward"):
            ours, flash = (times.get((shape, name, each)) or "–" for name in ("native", FLASH))
            found = [flash, ours, _ratio(flash, ours)]
            if others:
                peers = [time for name in EXACT_PEERS if (time := times.get((shape, name, each)))]
                best = min(peers, key=float)
                found = [flash, best, ours, _ratio(flash, ours), _ratio(best, ours)]
            for cell, text in zip(cells, found, strict=True):
                cell.append(text)
        lines.append(f"| {' | '.join([shape.replace('x', ', '), *map(' / '.join, cells)])} |")
    return [*lines, "", source(rows)]


def host_time(rows: Rows) -> list[str]:
    """One line a shape: µs of the host, both passes, by backend."""
    times = {(row["shape"], row["backend"], row["pass"]): row["host_us"] for row in rows}
    names = list(dict.fromkeys(row["backend"] for row in rows))
    lines = [f"| B, H, N_q, N_k, D | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        cells = [
            " / ".join(
                f"{float(times[shape, name, each]):.0f}" for each in ("forward", "forward+backward")
            )
            for name in names
        ]
        lines.append(f"| {' | '.join([shape.replace('x', ', '), *cells])} |")
    return [*lines, "", source(rows)]


def accuracy(rows: Rows) -> list[str]:
    """One line a head dim, deviation and backend, in bf16: relative errors and the worst cosine."""
    names = ("out", "dq", "dk", "dv")
    lines = [f"| D | σ | backend | {' | '.join(names)} | smallest cosine |"]
    lines += ["|---" * (len(names) + 4) + "|"]
    for row in rows:
        if row["dtype"] == "bf16":
            head = (row["head_dim"], f"{float(row['deviation']):g}", f"`{row['backend']}`")
            errors = (f"{float(row[f'{name}_l2']):.1e}" for name in names)
            worst = min(float(row[f"{name}_cosine"]) for name in names)
            lines.append(f"| {' | '.join([*head, *errors, f'{worst:.6f}'])} |")
    return [*lines, "", source(rows)]


def unet_step(rows: Rows) -> list[str]:
    """One line a U-Net and attention: ms and peak of a denoising and of a training step."""
    found = {(row["model"], row["attention"], row["step"]): row for row in rows}
    lines = [
        "| U-Net, batch | attention | denoising | peak | training | peak |",
        "|---|---|---|---|---|---|",
    ]
    for model, attention in dict.fromkeys(key[:2] for key in found):
        cells = [f"{model}, {found[model, attention, 'denoising']['batch']}", attention]
        for step in ("denoising", "training"):
            row = found[model, attention, step]
            if row["median_ms"]:
                time = f"{float(row['median_ms']):.1f} ms"
                if sdpa := found[model, "sdpa", step]["median_ms"]:
                    time += f" ({float(sdpa) / float(row['median_ms']):.2f} ×)"
                cells += [time, f"{float(row['peak_mib']) / 1024:.2f} GiB"]
            else:
                cells += ["–", row["refusal"].split(": ", 1)[-1]]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"× is SDPA's time ÷ its own. {source(rows)}"]


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "accuracy": accuracy,
    "attention_gains": attention_gains,
    "attention_speed": attention_speed,
    "host_time": host_time,
    "kept_activations": kept_activations,
    "native_ada": native_speed,
    "native_ampere": native_speed,
    "native_speed": native_speed,
    "native_speed_fp16": native_speed,
    "native_tiles": native_speed,
    "unet_step": unet_step,
    **training_tables.TABLES,
}


# Of tables whose results have another name.
SOURCES = {
    "attention_gains": "attention_speed",
    "native_ada": "attention_speed_100kib",
    "native_ampere": "attention_speed_164kib",
    "native_speed": "attention_speed",
    "native_speed_fp16": "attention_speed_fp16",
    "native_tiles": "attention_speed_tiles",
    **training_tables.SOURCES,
}


def fill(text: str) -> str:
    """Return the text with every marked table made anew; one without lines stays as it is."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        results = SOURCES.get(name, name)
        lines = TABLES[name](read(results)) if (RESULTS / f"{results}.csv").exists() else []
        if not lines:
            return match[0]
        return "\n".join([f"<!-- table: {name} -->", *lines, "<!-- end -->"])

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Fill the pages, or check that they are filled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    checks = parser.parse_args().check
    for page in PAGES:
        before = page.read_text()
        after = fill(before)
        if checks and after != before:
            sys.exit(f"{page.name} does not show benchmarks/results: python -m benchmarks.report")
        page.write_text(after)


if __name__ == "__main__":
    main()
