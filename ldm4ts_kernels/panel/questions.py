"""The child process's side: reads a question a line, answers with the functions of the CLI."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from ldm4ts_kernels import vram


def estimate_all_batches(**arguments: Any) -> dict[str, Any]:
    """Return estimate_vram_usage for 1 .. LARGEST_BATCH windows by the batch size as a text."""
    sizes = range(1, vram.LARGEST_BATCH + 1)
    return {f"{size}": vram.estimate_vram_usage(size, **arguments) for size in sizes}


def recommend_for(**arguments: Any) -> dict[str, Any]:
    """Return vram.recommend's fields, or {"nothing_fits": why}."""
    try:
        return asdict(vram.recommend(**arguments))
    except ValueError as error:
        return {"nothing_fits": f"{error}"}


def forecast_for(**arguments: Any) -> dict[str, Any]:
    """Return a forecast as the page shows it."""
    # Loads diffusers, which the estimates alone take their time without.
    from ldm4ts_kernels.panel.shown_forecast import show_forecast

    return asdict(show_forecast(**arguments))


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "estimate": estimate_all_batches,
    "recommend": recommend_for,
    "forecast": forecast_for,
}


def answer(line: str) -> dict[str, Any]:
    """Return {"answer": ...}, or {"error": ...} for what a user may have asked wrongly."""
    function, arguments = json.loads(line)
    try:
        return {"answer": FUNCTIONS[function](**arguments)}
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return {"error": f"{error}"}


def main() -> None:
    """Answer until stdin ends, which it does with the parent."""
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        for line in sys.stdin:
            answers.write(json.dumps(answer(line)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
