"""Write the README's tables from results/*.csv, between its markers: python -m benchmarks.report

`<!-- table: NAME -->` opens a table and `<!-- end -->` closes it; what stands between is replaced.
With --check nothing is written, and a table that differs is an error.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import RESULTS

README = Path(__file__).parents[1] / "README.md"
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


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


def vram_accuracy(rows: Rows) -> list[str]:
    """One line a part, image size and precision: peak of a training step at batch 4."""
    chosen = [row for row in rows if row["batch_size"] == "4" and row["part"] != "autoencoder"]
    peaks = {
        (row["part"], row["px"], row["precision"], row["backend"], row["gradient_checkpointing"]):
        float(row["allocated_mib"]) / 1024
        for row in chosen
    }  # fmt: skip
    lines = [
        "| training step, batch 4 | image | precision | default attention | ours "
        "| ours, checkpointed | saved |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"forecaster": "LDM4TS", "unet": "its U-Net alone"}
    for part, px, precision in dict.fromkeys(key[:3] for key in peaks):
        default, ours, lean = (
            peaks[part, px, precision, backend, checkpointing]
            for backend, checkpointing in (
                ("default", "False"),
                ("flash", "False"),
                ("flash", "True"),
            )
        )
        lines.append(
            f"| {names[part]} | {px} px | {precision} | {default:.2f} GiB | {ours:.2f} GiB "
            f"| **{lean:.2f} GiB** | {1 - lean / default:.0%} |"
        )
    measured = f"*{rows[0]['gpu']}; torch {rows[0]['torch']}; "
    return [*lines, "", measured + "`python -m benchmarks.vram_accuracy --measure`.*"]


def source(rows: Rows) -> str:
    """Say where a table's figures come from."""
    return f"*{rows[0]['gpu']}; {rows[0]['versions']}; `{rows[0]['command']}`.*"


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "kept_activations": kept_activations,
    "vram_accuracy": vram_accuracy,
}


def fill(text: str) -> str:
    """Return the text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        return "\n".join([f"<!-- table: {name} -->", *TABLES[name](read(name)), "<!-- end -->"])

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Fill the README, or check that it is filled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    checks = parser.parse_args().check
    before = README.read_text()
    after = fill(before)
    if checks and after != before:
        sys.exit("README.md does not show benchmarks/results; run python -m benchmarks.report")
    README.write_text(after)


if __name__ == "__main__":
    main()
