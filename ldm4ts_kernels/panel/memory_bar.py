"""The bytes of an estimate as a stacked bar with a legend, against the size of the card."""

from nicegui import ui

from ldm4ts_kernels.training_memory import GIB

# Rows of estimate_vram_usage's "bytes": a name and a colour that reads on white and on black.
SHOWN = {
    "parameters": ("Parameters", "#2563eb"),
    "gradients": ("Gradients", "#60a5fa"),
    "optimizer": ("Optimizer states", "#0e9488"),
    "inputs": ("Inputs", "#a3a3a3"),
    "activations": ("Activations", "#f59e0b"),
    "temporaries": ("Temporaries", "#f97316"),
    "workspaces": ("Workspaces", "#a855f7"),
    "allocator": ("Allocator's reserve", "#d946ef"),
    "cuda_context": ("CUDA context", "#737373"),
}


class MemoryBar:
    """A bar that `show` fills; what it says is also in the legend, for those who hear the page."""

    def __init__(self) -> None:
        bar = ui.element("div").classes("w-full h-6 flex rounded overflow-hidden").mark("bar")
        self.bar = bar.style("background: rgba(128, 128, 128, 0.2)").props("aria-hidden=true")
        self.legend = ui.element("div").classes(
            "w-full grid grid-cols-1 sm:grid-cols-2 gap-x-6 gap-y-1 text-sm"
        )

    def clear(self) -> None:
        """Show nothing."""
        self.bar.clear()
        self.legend.clear()

    def show(self, table: dict[str, int], card_gb: float | None) -> None:
        """Draw the table's bytes as shares of the card, or of their own sum where that is more."""
        self.clear()
        whole = max(sum(table.values()), (card_gb or 0) * GIB)
        for name, size in table.items():
            title, color = SHOWN.get(name, (name.replace("_", " "), "#525252"))
            with self.bar:
                part = ui.element("div").style(f"width: {100 * size / whole}%; background: {color}")
                with part:
                    ui.tooltip(f"{title}: {size / GIB:.3f} GiB")
            with self.legend, ui.row().classes("items-center gap-2 no-wrap"):
                ui.element("div").classes("w-3 h-3 rounded-sm shrink-0").style(
                    f"background: {color}"
                )
                ui.label(title).classes("grow")
                ui.label(f"{size / GIB:.3f}").classes("tabular-nums").mark(f"bytes-{name}")
