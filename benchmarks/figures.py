"""Draw the front page's pictures from results: python -m benchmarks.figures → docs/images."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import RESULTS, read
from benchmarks.report import OWN, PEERS, ROOT, device_times
from benchmarks.training_tables import CLAIMS

IMAGES = ROOT / "docs" / "images"
ORDER = ("sdpa flash", "flex", "sdpa cudnn")
COLORS = {
    "FlashAttention-2": "0.75", "FlexAttention": "0.55", "cuDNN": "0.35", "ours": "tab:blue",
}  # fmt: skip


def draw_speed(axes: Axes, passes: str) -> None:
    """Draw every shape's speed as a multiple of FlashAttention-2's; ours is the faster kernel."""
    times = device_times(read("attention_speed"))
    shapes = list(dict.fromkeys(shape for shape, _, _ in times))
    names = {**{PEERS[peer]: (peer,) for peer in ORDER}, "ours": OWN}
    bars = {
        label: [min(float(times[shape, name, passes]) for name in found) for shape in shapes]
        for label, found in names.items()
    }
    base = bars["FlashAttention-2"]
    for index, (label, found) in enumerate(bars.items()):
        speeds = [reference / value for reference, value in zip(base, found, strict=True)]
        places = [place + 0.2 * (index - 1.5) for place in range(len(shapes))]
        axes.bar(places, speeds, width=0.2, label=label, color=COLORS[label])
    axes.set_xticks(range(len(shapes)), shapes, rotation=35, ha="right", fontsize=8)
    axes.set_ylabel(f"{passes}, × FlashAttention-2")
    axes.axhline(1.0, color="0.8", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def draw_levers(axes: Axes, px: str) -> None:
    """Draw memory against speed at batch 4, a point a set of levers; hollow: the guide's claims."""
    rows = [r for r in read("training_levers") if (r["px"], r["batch"]) == (px, "4")]
    # Steps on the way to `leanest` lie beside it, and channels_last beside the plain layout.
    rows = [r for r in rows if "channels_last" not in r["name"] and not r["name"].startswith("+")]
    default = [float(row["ms"]) for row in rows if row["name"] == "Default"]
    for row in rows if default else ():
        claim = CLAIMS.get(("4", row["name"]))
        place = float(row["in_all_mib"]) / 1024, default[0] / float(row["ms"])
        axes.scatter(*place, color="0.55" if claim else "tab:blue", s=24)
        below = row["name"] in ("FlashAttention", "FlashAttention + GC")
        offset = (4, -9) if below else (4, 4)
        axes.annotate(row["name"], place, xytext=offset, textcoords="offset points", fontsize=7)
        if claim and px == "224":
            axes.scatter(claim[0], claim[2] / 100, facecolors="none", edgecolors="0.55", s=24)
    axes.set_yscale("log")
    axes.set_yticks((0.5, 1, 2, 4, 8), ("0.5", "1", "2", "4", "8"))
    axes.minorticks_off()
    axes.set_xlabel("memory of the process, GiB")
    axes.set_ylabel("speed, × Default")
    axes.set_title(
        f"{px} px" + ("; hollow: as the guide claims" if px == "224" else ""), fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)


def draw_estimates(axes: Axes) -> None:
    """Draw each configuration's estimate over what was measured."""
    rows = read("vram_accuracy")
    for part, color in (("forecaster", "tab:blue"), ("autoencoder", "tab:cyan")):
        found = [
            (float(row["allocated_mib"]) / 1024, float(row["estimate_mib"]) / 1024)
            for row in rows
            if row["part"] == part
        ]
        axes.scatter(*zip(*found, strict=True), s=14, color=color, label=part)
    limits = axes.get_xlim()
    axes.plot(limits, limits, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured peak of a training step, GiB")
    axes.set_ylabel("estimated, GiB")
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, name: str, folder: Path = IMAGES) -> None:
    figure.savefig(folder / name, metadata={"Date": None})


def main() -> None:
    """Draw the pictures of what was measured, the same bytes from the same results."""
    matplotlib.rcParams["svg.hashsalt"] = "ldm4ts-kernels"
    speed = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, passes in zip(speed.subplots(2, 1), ("forward", "forward+backward"), strict=True):
        draw_speed(axes, passes)
    speed.axes[0].legend(ncols=4, frameon=False, fontsize=9)
    gpu = read("attention_speed")[0]["gpu"]
    speed.suptitle(f"Attention on {gpu}, bf16, by shape B x H x N_q x N_k x D", fontsize=11)
    save(speed, "attention_speed.svg")
    if (RESULTS / "training_levers.csv").exists():
        levers = Figure(figsize=(11, 4.6), layout="constrained")
        for axes, px in zip(levers.subplots(1, 2), ("224", "512"), strict=True):
            draw_levers(axes, px)
        gpu = read("training_levers")[0]["gpu"]
        levers.suptitle(f"A training step of LDM4TS, batch 4, on {gpu}", fontsize=11)
        save(levers, "training_levers.svg")
    if "estimate_mib" in read("vram_accuracy")[0]:
        estimates = Figure(figsize=(6, 5), layout="constrained")
        draw_estimates(estimates.subplots())
        estimates.axes[0].legend(frameon=False, fontsize=9)
        save(estimates, "vram_accuracy.svg", RESULTS)


if __name__ == "__main__":
    main()
