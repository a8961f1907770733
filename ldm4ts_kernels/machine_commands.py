"""`ldm4ts doctor | backends | bench | estimate | recommend`: the machine, and what fits it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from ldm4ts_kernels import explain
from ldm4ts_kernels.backends import CHAINS
from ldm4ts_kernels.bench import time_attention
from ldm4ts_kernels.commands import app, note, out
from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.doctor import BackendFinding, diagnose
from ldm4ts_kernels.training_memory import GIB
from ldm4ts_kernels.vram import Recommendation, estimate_vram_usage, recommend

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Show GPU, driver, torch, the extras and the backends; and the command that mends each."""
    found = diagnose()
    if as_json:
        out.print_json(json.dumps(found.as_dict()))
        return
    fixes: dict[str, None] = {}  # in the order of appearance, each once
    for finding in found.machine:
        mark = {True: "ok", False: "missing", None: "-"}[finding.ok]
        _line(f"{mark:<8} {finding.name:<17} {finding.found}")
        if finding.fix and finding.ok is False:
            fixes[finding.fix] = None
    for backend in found.backends:
        _line(f"{_verdict(backend):<8} {backend.precision:<6} {_described(backend)}")
        if backend.fix and not backend.trains and torch.cuda.is_available():
            fixes[backend.fix] = None
    _line("")
    if not torch.cuda.is_available():
        _line("Every backend but sdpa needs an NVIDIA GPU, its driver, and a torch with CUDA.")
    for fix in ["To mend or to add:", *fixes] if fixes else ["Nothing to install."]:
        _line(fix)


def _verdict(backend: BackendFinding) -> str:
    if backend.chosen:
        return "serves"
    return "by name" if backend.trains else "infers" if backend.infers else "no"


def _described(backend: BackendFinding) -> str:
    reasons = "; ".join(backend.reasons) or "could serve"
    return f"{backend.name:<15} " + ("auto takes it" if backend.chosen else reasons)


def _line(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command("backends")
def backends_command(
    head_dim: Annotated[int, typer.Option("--head-dim", min=1, help="Width of a head.")] = 64,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Queries and keys.")] = 1024,
    training: Annotated[bool, typer.Option("--training", help="A gradient is needed.")] = False,
    as_json: Json = False,
) -> None:
    """Say which attention backends this machine has, and why not the others."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float)
    query = torch.zeros(1, 8, tokens, head_dim, device=device, dtype=dtype, requires_grad=training)
    chains = {name: explain(query, query, query, precision=name) for name in CHAINS}
    if as_json:
        shown = {
            name: {"chosen": explained.chosen, "reasons": dict(explained.reasons)}
            for name, explained in chains.items()
        }
        out.print_json(json.dumps(shown))
        return
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    kind = "training" if training else "inference"
    note(f"{where}, {dtype}, {kind}, {tokens} tokens, head dim {head_dim}")
    for precision, explained in chains.items():
        for name, reasons in explained.reasons.items():
            verdict = "serves" if name == explained.chosen else "could serve"
            _line(f"{precision:<6} {name:<14} {'; '.join(reasons) or verdict}")


@app.command("bench")
def bench_command(
    shape: Annotated[str, typer.Argument(help="BxHxQxKxD.")] = "4x8x784x784x40",
    backward: Annotated[bool, typer.Option("--backward", help="Both passes.")] = False,
    as_json: Json = False,
) -> None:
    """Time attention against its peers on this GPU, with the benchmark suite's own functions."""
    rows = list(time_attention(shape, backward))
    if as_json:
        out.print_json(json.dumps(rows))
        return
    table = Table("backend", "device ms", "eager ms", "TFLOP/s", "refusal")
    for row in rows:
        cells = (row[name] for name in ("backend", "device_ms", "eager_ms", "tflops", "refusal"))
        table.add_row(*map(str, cells))
    out.print(table)


Windows = Annotated[int, typer.Option("--batch-size", help="Windows in a step.")]
Model = Annotated[str, typer.Option("--preset", help="paper, guide.")]
Pixels = Annotated[
    int | None, typer.Option("--image-size", help="Pixels; the preset's if not given.")
]


@app.command("estimate")
def estimate_command(
    batch_size: Windows = 4,
    backend: Annotated[
        str, typer.Option("--attention", help="default, flash, sage, auto.")
    ] = "flash",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing")
    ] = False,
    checkpointing: Annotated[
        str | None,
        typer.Option("--checkpointing", help="none, full, selective: the same, by mode."),
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, adamw8bit.")] = "adamw",
    weights: Annotated[str, typer.Option("--weights", help="fp32, bf16.")] = "fp32",
    accumulate: Annotated[int, typer.Option("--accumulate", help="Parts of a batch.")] = 1,
    image_size: Pixels = None,
    preset: Model = "guide",
    precision: Annotated[str, typer.Option("--precision", help="fp32, bf16.")] = "fp32",
    part: Annotated[
        str, typer.Option("--part", help="model, or unet for the U-Net alone.")
    ] = "model",
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph/--no-cuda-graph", help="As train records a step on a GPU."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what training takes of a GPU's memory; needs none, and takes seconds."""
    size = None if image_size is None else (image_size, image_size)
    try:
        estimate = estimate_vram_usage(
            batch_size,
            backend,
            checkpointing or gradient_checkpointing,
            size,
            preset,
            precision,
            part,
            optimizer=optimizer,
            weights=weights,
            accumulate=accumulate,
            cuda_graph=cuda_graph,
        )
    except ValueError as error:
        raise OptionError(f"{error}") from error
    if as_json:
        out.print_json(json.dumps(estimate))
        return
    table = Table("at the peak", "GiB")
    for name, size_in_bytes in estimate["bytes"].items():
        table.add_row(name.replace("_", " "), f"{size_in_bytes / GIB:.3f}")
    table.add_section()
    table.add_row("total", f"{estimate['total_estimated_gb']:.3f}")
    out.print(table)
    stages = ", ".join(f"{name} {size / GIB:.3f}" for name, size in estimate["stages"].items())
    out.print(f"tensors by stage, GiB: {stages}", highlight=False)
    saved = estimate["savings_vs_default_pct"]
    out.print(f"{saved:.0f} % below --attention default without checkpointing", highlight=False)


@app.command("recommend")
def recommend_command(
    vram_gb: Annotated[float, typer.Argument(help="Memory of the GPU, in GB of 2^30 bytes.")],
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Windows in a step, at least.")
    ] = 4,
    image_size: Pixels = None,
    preset: Model = "guide",
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, bf16; either if not given.")
    ] = None,
    lean: Annotated[
        bool, typer.Option("--lean", help="Also 8-bit optimizer states and bf16 weights (torchao).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Choose the settings with which training fits a GPU; needs none, and takes a minute."""
    size = None if image_size is None else (image_size, image_size)
    try:
        found = recommend(vram_gb, batch_size, size, preset, precision, lean)
    except ValueError as error:
        raise OptionError(f"{error}") from error
    if as_json:
        out.print_json(json.dumps(asdict(found)))
        return
    table = Table("attention", "precision", "GC", "optimizer", "weights", "batch", "costs")
    for option in found.considered:
        recomputed = "yes" if option.gradient_checkpointing else "no"  # gradient checkpointing
        largest = str(option.largest_batch or "none fits")
        table.add_row(
            option.attention_backend,
            option.precision,
            recomputed,
            option.optimizer + (", in backward" if option.optimizer_in_backward else ""),
            option.weights,
            largest,
            option.cost,
        )
    out.print(table)
    out.print(f"{found.why} Estimate: {found.estimated_gb:.2f} GiB.", highlight=False)
    _line(_train_command(found, preset, image_size))


def _train_command(found: Recommendation, preset: str, image_size: int | None) -> str:
    """Return the command that trains as was recommended."""
    checkpointing = "" if found.gradient_checkpointing else "no-"
    parts = [
        f"ldm4ts train --preset {preset}",
        "" if image_size is None else f"--image-size {image_size}",
        f"--attention {found.attention_backend} --precision {found.precision}",
        f"--{checkpointing}gradient-checkpointing --batch-size {found.batch_size}",
        "" if found.optimizer == "adamw" else f"--optimizer {found.optimizer}",
        "" if found.weights == "fp32" else f"--weights {found.weights}",
        "--optimizer-in-backward --gradient-clip 0" if found.optimizer_in_backward else "",
    ]
    return " ".join(part for part in parts if part)


@app.command("panel")
def panel_command(
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="To listen on; 0: a free one.")
    ] = 8080,
    host: Annotated[
        str, typer.Option("--host", help="Address; other than this machine's needs a --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option("--token", help="What a browser must know: ?token=...")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Directory of the runs.")] = Path("runs"),
) -> None:
    """Open the panel in a browser: forecast, train, and see what fits the GPU."""
    from ldm4ts_kernels.panel.server import serve

    address = f"[{host}]" if ":" in host else host
    known = "" if token is None else "?token=TOKEN"
    serve(runs, host, port, token, lambda at: note(f"http://{address}:{at}/{known}  (Ctrl-C ends)"))
