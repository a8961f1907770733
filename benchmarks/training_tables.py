"""The pages' tables about training LDM4TS: memory and speed, forecasts, estimates, from results."""

import statistics
from collections.abc import Callable, Iterable

from benchmarks.measure import Rows, source
from benchmarks.vram_accuracy import errors

# (batch size, set of levers): VRAM in GB, savings and speed in % of Default; the original guide's
# figures at 224 px, which were not measured.
CLAIMS = {
    ("4", "Default"): (8.0, 0, 100),
    ("4", "Default + GC"): (5.5, 31, 80),
    ("4", "SageAttention"): (5.7, 29, 95),
    ("4", "SageAttention + GC"): (4.1, 49, 75),
    ("4", "FlashAttention"): (5.2, 35, 90),
    ("4", "FlashAttention + GC"): (3.7, 54, 70),
    ("2", "SageAttention + GC"): (3.1, 61, None),
    ("2", "FlashAttention + GC"): (2.8, 65, None),
}
OURS = (
    "graph, fp32",
    "graph, bf16",
    "graph, bf16 + GC",
    "+ 8-bit AdamW",
    "+ bf16 weights",
    "leanest",
    "graph, bf16, channels_last",
    "leanest, channels_last",
)  # of `benchmarks.training_levers`
# LDM4TS (arXiv 2502.14887), table IX, ETTh1: MSE and MAE by horizon.
PAPER = {
    "1-96": (0.388, 0.411),
    "1-192": (0.412, 0.430),
    "1-336": (0.471, 0.473),
    "1-720": (0.501, 0.502),
}


def training_levers(rows: Rows) -> list[str]:
    """One line a shape and set of levers: memory and speed, beside what the guide claimed."""
    default = {(row["px"], row["batch"]): row for row in rows if row["name"] == "Default"}
    lines = [
        "| image, batch | levers | the guide: VRAM, saved, speed | allocated | in all | saved "
        "| a step | speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_place):
        peak, saved, speed = float(row["allocated_mib"]), "–", "–"
        if plain := default.get((row["px"], row["batch"])):
            saved = f"{1 - peak / float(plain['allocated_mib']):.0%}"
            speed = f"{float(plain['ms']) / float(row['ms']):.0%}"
        claim = CLAIMS.get((row["batch"], row["name"])) if row["px"] == "224" else None
        name = (
            row["name"] if row["precision"] in row["name"] else f"{row['name']}, {row['precision']}"
        )
        lines.append(
            f"| {row['px']} px, {row['batch']} | {name} "
            f"| {_claimed(claim)} | {peak / 1024:.2f} GiB "
            f"| {float(row['in_all_mib']) / 1024:.2f} GiB | {saved} "
            f"| {float(row['ms']):.1f} ms | {speed} |"
        )
    return [*lines, "", source(rows)]


def training_gains(rows: Rows) -> list[str]:
    """Of `training_levers`: the guide's sets at batch 4, our fastest and our leanest."""
    own = ("Default", "graph, bf16", "graph, bf16 + GC", "leanest")
    return training_levers(
        [
            row
            for row in rows
            if row["name"] in own or ((row["px"], row["batch"]) == ("224", "4") and _claims(row))
        ]
    )


def _claims(row: dict[str, str]) -> bool:
    return (row["batch"], row["name"]) in CLAIMS


def _place(row: dict[str, str]) -> tuple[int, int, int]:
    """Return where a row stands: batch 4 first, the guide's sets in its order, then ours."""
    names = [name for batch, name in CLAIMS if batch == "4"] + list(OURS)
    batch = int(row["batch"])
    return int(row["px"]), batch if batch != 4 else 0, names.index(row["name"])


def _claimed(claim: tuple[float, int, int | None] | None) -> str:
    if claim is None:
        return "–"
    vram, saved, speed = claim
    return f"{vram} GB, {saved}%" + ("" if speed is None else f", {speed}%")


def recommended_cards(rows: Rows) -> list[str]:
    """One line a card: what is recommended for it, and what 50 steps of that took."""
    lines = [
        "| card | recommended | batch | estimated | taken, of the card | first and last loss |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        recomputed = {"none": "no checkpointing"}.get(row["checkpointing"], "checkpointing")
        levers = f"{row['attention']} attention, {row['precision']}, {recomputed}"
        taken = float(row["in_all_gb"])
        lines.append(
            f"| {row['card_gb']} GB | {levers} "
            f"| {row['batch']} | {float(row['estimated_gb']):.2f} GiB "
            f"| {taken:.2f} GiB, {taken / float(row['card_gb']):.0%} "
            f"| {row['first_loss']}, {row['last_loss']} |"
        )
    return [*lines, "", source(rows)]


def forecast_quality(rows: Rows) -> list[str]:
    """ETTh1, one line a horizon: test errors with their spread over seeds, beside the paper's."""
    lines = [
        "| ETTh1, horizon | MSE | paper | MAE | paper | CRPS | last value | seasonal naive |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown: Rows = []
    behind = []
    for horizons, paper in PAPER.items():
        key = ("etth1", horizons, "flash")
        seeds = [row for row in rows if (row["data"], row["horizons"], row["backend"]) == key]
        if not seeds:
            continue
        shown += seeds
        horizon = horizons.removeprefix("1-")
        mse, mae, crps = (_spread(seeds, name) for name in ("mse", "mae", "crps"))
        naive = [
            f"{float(seeds[0][f'{kind}_mse']):.3f}, {float(seeds[0][f'{kind}_mae']):.3f}"
            for kind in ("last", "seasonal")
        ]
        lines.append(
            f"| {horizon} | {mse} | {paper[0]:.3f} | {mae} | {paper[1]:.3f} "
            f"| {crps} | {' | '.join(naive)} |"
        )
        for name, stated in zip(("mse", "mae"), paper, strict=True):
            if _mean(seeds, name) > stated:
                behind.append(f"{name.upper()} at {horizon}")
    verdict = f"Behind the paper: {', '.join(behind) or 'none'}. ± is a seed's largest distance"
    return [*lines, "", f"{verdict} from the mean. {_evaluated(shown)}"] if shown else []


def attention_quality(rows: Rows) -> list[str]:
    """One line a data set and attention: errors with their spread over seeds."""
    lines = []
    for data, horizons in (("etth1", "1-96"), ("eurusd", "1,6,30")):
        chosen = [row for row in rows if (row["data"], row["horizons"]) == (data, horizons)]
        groups = {
            name: [row for row in chosen if row["backend"] == name]
            for name in ("default", "flash", "sage")
        }
        for name, seeds in groups.items():
            if not seeds or not groups["default"]:
                continue
            scores = ("validation_mse", "mse", "mae", "crps")
            cells = [_spread(seeds, score) for score in scores]
            ratio = _mean(seeds, "mse") / _mean(groups["default"], "mse")
            lines.append(
                f"| {data}, {horizons} | {name} | {' | '.join(cells)} | {ratio - 1:+.2%} |"
            )
    head = [
        "| data | attention | validation MSE | test MSE | test MAE | test CRPS | MSE ÷ default |",
        "|---|---|---|---|---|---|---|",
    ]
    return [*head, *lines, "", _evaluated(rows)] if lines else []


def _spread(rows: Rows, name: str) -> str:
    """Return the mean over seeds, and the largest distance from it."""
    values, mean = [float(row[name]) for row in rows], _mean(rows, name)
    return f"{mean:.4f} ± {max(abs(value - mean) for value in values):.4f}"


def _mean(rows: Rows, name: str) -> float:
    return statistics.mean(float(row[name]) for row in rows)


def _evaluated(rows: Rows) -> str:
    counts = dict.fromkeys(f"{row['windows']} of {row['windows_in_all']}" for row in rows)
    seeds = len({row["seed"] for row in rows})
    windows, steps = ", ".join(counts), rows[0]["steps"]
    trained = f"{seeds} seeds, {steps} steps"
    return f"{source(rows)[:-1]} {trained}; windows scored, evenly spaced: {windows}.*"


def sampling_time(rows: Rows) -> list[str]:
    """One line a horizon and precision: ms of a series' forecast, beside the paper's table."""
    lines = [
        "| horizon | precision | 1 draw | 100 draws | the paper: LDM4TS | the paper: CSDI |",
        "|---|---|---|---|---|---|",
    ]
    times = {(row["horizon"], row["precision"], row["samples"]): row for row in rows}
    for horizon, precision in dict.fromkeys((row["horizon"], row["precision"]) for row in rows):
        one, many = (times[horizon, precision, samples] for samples in ("1", "100"))
        lines.append(
            f"| {horizon} | {precision} | {one['ms']} ms | {many['ms']} ms "
            f"| {one['paper_ms']} ms | {one['csdi_ms']} ms |"
        )
    return [*lines, "", source(rows)]


def two_gpus(rows: Rows) -> list[str]:
    """One line a batch and way: time, memory, and the losses beside one GPU's."""
    lines = [
        "| batch | states | a step | windows a second | × one GPU | peak of a GPU "
        "| weights and states of it | largest difference of a loss | last loss |",
        "|---" * 9 + "|",
    ]
    names = {"one": "one GPU", "DDP": "two GPUs, whole", "FSDP2": "two GPUs, shared"}
    for row in sorted(rows, key=lambda row: (int(row["batch"]), list(names).index(row["way"]))):
        cells = [row["batch"], names[row["way"]]]
        if row["refusal"]:
            cells += [row["refusal"].replace("|", "/"), *["–"] * 6]
        else:
            step = f"{float(row['ms']):.1f} ms"
            cells += [
                step if row["graph"] == "True" else f"{step}, eager",
                row["windows_per_second"],
                f"{float(row['scaling']):.2f}" if row["scaling"] else "–",
                *(f"{float(row[name]) / 1024:.2f} GiB" for name in ("peak_mib", "kept_mib")),
                row["loss_difference"] or "–",
                row["last_loss"],
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", source(rows)]


def estimate_accuracy(rows: Rows) -> list[str]:
    """One line a stage: how far the estimates are off; none of results without estimates."""
    if "estimate_mib" not in rows[0]:
        return []
    lines = [
        "| stage | configurations | allocated: mean, largest error, within 3 % "
        "| in all: mean, largest error, within 5 % |",
        "|---|---|---|---|",
    ]
    for part in dict.fromkeys(row["part"] for row in rows):
        found = [errors(row) for row in rows if row["part"] == part]
        allocated, in_all = zip(*found, strict=True)
        lines.append(f"| {part} | {len(found)} | {_off(allocated, 3)} | {_off(in_all, 5)} |")
    return [*lines, "", source(rows)]


def _off(percents: Iterable[float], limit: float) -> str:
    sizes = [abs(percent) for percent in percents]
    within = sum(size <= limit for size in sizes)
    return f"{statistics.mean(sizes):.1f} %, {max(sizes):.1f} %, {within} of {len(sizes)}"


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "attention_quality": attention_quality,
    "estimate_accuracy": estimate_accuracy,
    "forecast_quality": forecast_quality,
    "recommended_cards": recommended_cards,
    "sampling_time": sampling_time,
    "training_gains": training_gains,
    "training_levers": training_levers,
    "two_gpus": two_gpus,
}
SOURCES = {
    "attention_quality": "forecast_quality",
    "estimate_accuracy": "vram_accuracy",
    "training_gains": "training_levers",
}
