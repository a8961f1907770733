"""How well LDM4TS forecasts: ETTh1 by horizon, and two data sets by attention backend, by seed.

    python -m benchmarks.forecast_quality --folder data   # on a GPU: results/forecast_quality.csv

The folder holds ETTh1.csv (zhouhaoyi/ETDataset) and EURUSDh4.csv (ejtraderLabs/historical-data).
Each run is `ldm4ts train --preset paper` in a process of its own, several side by side; its scores
are those of its test part, over evenly spaced windows, in units of the training part's deviation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import write_rows

SEEDS = (0, 1, 2)
BACKENDS = ("flash", "default", "sage")
DATA = {
    "etth1": "--data etth1 --data-path {}/ETTh1.csv --history 336",
    "eurusd": (
        "--data csv --data-path {}/EURUSDh4.csv --timestamp Date --target close --history 96 "
        "--columns open,high,low,close,tick_volume --period 6"
    ),
}
# bf16, as INT8 kernels need it; the same for all backends. The rate, the steps and the patch
# Transformer's size are those with the least validation error at horizons 96 and 720: at a rate of
# 1e-3 the Transformer fits the training part and loses the long horizons.
TRAINING = (
    "--preset paper --device cuda --precision bf16 --checkpointing none --batch-size 32 "
    "--steps 300 --learning-rate 3e-4 --ema-decay 0.98 --autoencoder-steps 100 "
    "--validate-every 100000 --checkpoint-every 100000 --log-every 50 "
    "--eval-windows 400 --eval-samples 4 --model-field dropout=0.3 "
    "--model-field d_model=64 --model-field d_ff=128 --model-field encoder_layers=3"
)


@dataclass(frozen=True)
class Run:
    """One training run."""

    data: str
    horizons: str  # as the command line has them
    backend: str
    seed: int

    def command(self, folder: Path, output: Path, options: list[str]) -> list[str]:
        given = f"{DATA[self.data].format(folder)} --horizons {self.horizons} {TRAINING}"
        own = f"--attention {self.backend} --seed {self.seed} --output {output}"
        program = [sys.executable, "-m", "ldm4ts_kernels.cli", "train"]
        return [*program, *given.split(), *own.split(), *options]


def runs(backends: Sequence[str]) -> Iterator[Run]:
    """Yield every run, the horizons of ETTh1 first, then backend beside backend."""
    for horizon in (720, 336, 192, 96):
        for seed in SEEDS:
            yield Run("etth1", f"1-{horizon}", "flash", seed)
    for backend in backends:
        for data, horizons in (("eurusd", "1,6,30"), ("etth1", "1-96")):
            for seed in SEEDS:
                if (data, backend) != ("etth1", "flash"):
                    yield Run(data, horizons, backend, seed)


def read_scores(run: Run, directory: Path, seconds: float) -> dict[str, object]:
    """Return what a finished run wrote, as a row."""
    test = json.loads((directory / "test_metrics.json").read_text())
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    named = {"ldm4ts": "", "last value": "last_", "seasonal naive": "seasonal_"}
    scores = {
        prefix + score: round(test["scores"][name][score], 5)
        for name, prefix in named.items()
        for score in ("mse", "mae", "crps")
    }
    return {
        "data": run.data,
        "horizons": run.horizons,
        "backend": run.backend,
        "seed": run.seed,
        "steps": last["step"],
        "windows": test["windows"],
        "windows_in_all": test["windows_in_all"],
        "validation_mse": round(last["validation"]["ldm4ts"]["mse"], 5),
        **scores,
        "attention": last["attention"],
        "seconds": round(seconds, 1),
    }


def train_all(
    chosen: list[Run], folder: Path, at_once: int, seconds: float, options: list[str]
) -> int:
    """Train, at_once processes side by side, and write the file anew whenever one has ended.

    After `seconds` those that still train are ended, and nothing is known of them. Returns how many
    runs have no row.
    """
    rows: list[dict[str, object]] = []
    waiting = list(chosen)
    going: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    deadline = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        while (waiting or going) and time.perf_counter() < deadline:
            while waiting and len(going) < at_once:
                run = waiting.pop(0)
                output = _directory(scratch, run)
                log = Path(f"{output}.log").open("wb")  # noqa: SIM115
                command = run.command(folder, output, options)
                going[run] = subprocess.Popen(command, stdout=log, stderr=log), time.perf_counter()
            time.sleep(0.2)
            for run, (process, began) in list(going.items()):
                if process.poll() is None:
                    continue
                del going[run]
                output = _directory(scratch, run)
                if process.returncode:
                    print(run, Path(f"{output}.log").read_text()[-1500:], flush=True)
                    continue
                rows.append(read_scores(run, output, time.perf_counter() - began))
                print(*rows[-1].values(), flush=True)
                write_rows("forecast_quality", rows)
        for run, (process, _) in going.items():
            print("not finished:", run, Path(f"{_directory(scratch, run)}.log").read_text()[-300:])
            process.kill()
            process.wait()
    return len(chosen) - len(rows)


def _directory(scratch: str, run: Run) -> Path:
    return Path(scratch) / f"{run.data}-{run.horizons}-{run.backend}-{run.seed}"


def main() -> None:
    """Train all runs, or those of the named data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of them")
    parser.add_argument("--data", nargs="*", choices=DATA, default=list(DATA))
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=list(BACKENDS))
    options, rest = parser.parse_known_args()  # the rest: options of `ldm4ts train`
    chosen = [run for run in runs(options.backends) if run.data in options.data]
    if missing := train_all(chosen, options.folder, options.at_once, options.seconds, rest):
        sys.exit(f"{missing} of {len(chosen)} runs have no scores: see above")


if __name__ == "__main__":
    main()
