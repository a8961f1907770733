"""The tab Generative Forecast: a run, a series, and what may follow: fan, table, file, views."""

from typing import Any

import torch
from nicegui import events, ui

from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.forecasting import find_forecasters
from ldm4ts_kernels.panel.charts import fan_chart
from ldm4ts_kernels.panel.run_state import find_runs
from ldm4ts_kernels.panel.shown_forecast import ShownForecast
from ldm4ts_kernels.panel.state import PanelState
from ldm4ts_kernels.panel.uploads import LARGEST_UPLOAD, keep_upload
from ldm4ts_kernels.panel.widgets import FIELD, card, quiet_button
from ldm4ts_kernels.panel.worker import WorkerError

DEFAULT_SAMPLES = 100
NEWEST = "the finished model, or the newest"


class ForecastTab:
    """The choice of a run and its options, and the forecast below."""

    def __init__(self, panel: PanelState) -> None:
        self.panel = panel
        self.path: str | None = None
        with card("Forecast"):
            self._build_choice()
        self.result = ui.column().classes("w-full gap-4 min-w-0")
        ui.timer(2.0, self._offer_runs)
        self._offer_runs()

    def _build_choice(self) -> None:
        def field(label: str, value: int | None, name: str, **options: Any) -> ui.number:
            made = ui.number(label, value=value, step=1, **options).classes(FIELD).mark(name)
            return made.props("outlined dense hide-bottom-space stack-label")

        with ui.row().classes("w-full gap-3"):
            self.runs = ui.select([], label="Trained run").classes(FIELD).mark("forecast-run")
            self.runs.props("outlined dense")
            self.checkpoint = ui.select([NEWEST], value=NEWEST, label="Checkpoint").classes(FIELD)
            self.checkpoint.mark("forecast-checkpoint").props("outlined dense")
            self.samples = field("Draws", DEFAULT_SAMPLES, "samples", min=2)
            self.sampling_steps = field(
                "Sampling steps", None, "sampling-steps", min=1, placeholder="the model's"
            )
            self.hold_out = field("Hold out (rows)", 0, "hold-out", min=0)
        with ui.expansion("Another series with the same columns").classes("w-full"):
            self.upload = ui.upload(
                label="CSV file", auto_upload=True, max_file_size=LARGEST_UPLOAD
            ).on_upload(self._take_file)
            self.upload.classes("w-full").props('accept=".csv,text/csv" flat bordered')
            self.file = ui.label().classes(
                "text-sm text-neutral-600 dark:text-neutral-400 break-all"
            )
        with ui.row().classes("items-center gap-3"):
            self.button = ui.button("Forecast", on_click=self._forecast).mark("forecast")
            self.button.props("no-caps unelevated")
            self.spinner = ui.spinner(size="sm")
            self.spinner.visible = False
        self.error = ui.label().classes("text-sm text-red-700 dark:text-red-400 break-words")
        self.error.mark("forecast-error").props("role=alert")

    def _offer_runs(self) -> None:
        names = find_runs(self.panel.root)
        if names != self.runs.options:
            current = self.runs.value if self.runs.value in names else None
            self.runs.set_options(names, value=current or (names[0] if names else None))
        found = find_forecasters(self.panel.root / self.runs.value) if self.runs.value else []
        if self.checkpoint.options != [NEWEST, *found]:
            chosen = self.checkpoint.value if self.checkpoint.value in found else NEWEST
            self.checkpoint.set_options([NEWEST, *found], value=chosen)
        self.button.set_enabled(bool(names) and not self.spinner.visible)
        if not names and not self.error.text:
            self.error.classes(replace="text-sm text-neutral-600 dark:text-neutral-400")
            self.error.text = "No run yet: train one in the next tab."
        elif names and self.error.text.startswith("No run yet"):
            self.error.text = ""

    async def _take_file(self, event: events.UploadEventArguments) -> None:
        self.path = await keep_upload(event.file, self.panel.root)
        self.upload.reset()
        self.file.text = f"Forecasting {event.file.name}"

    async def _forecast(self) -> None:
        self.error.text = ""
        self.error.classes(replace="text-sm text-red-700 dark:text-red-400 break-words")
        self.spinner.visible = True
        self.button.set_enabled(False)
        try:
            made = await self.panel.forecaster.ask("forecast", self._arguments())
        except (OptionError, WorkerError) as error:
            self.error.text = f"{error}"
        else:
            self._show(ShownForecast(**made))
        finally:
            if torch.cuda.is_available():
                self.panel.forecaster.close()  # its CUDA context is memory that training may want
            self.spinner.visible = False
            self.button.set_enabled(True)

    def _arguments(self) -> dict[str, Any]:
        """Return show_forecast's arguments. Raises OptionError for a field that does not do."""
        steps = self.sampling_steps.value
        return {
            "directory": str(self.panel.root / str(self.runs.value)),
            "checkpoint": None if self.checkpoint.value == NEWEST else self.checkpoint.value,
            "path": self.path,
            "hold_out": _whole("hold_out", self.hold_out.value, 0),
            "samples": _whole("samples", self.samples.value, 2),
            "sampling_steps": None if steps is None else _whole("sampling_steps", steps, 1),
        }

    def _show(self, made: ShownForecast) -> None:
        self.result.clear()
        with self.result:
            with card(made.title):
                for target in range(len(made.names)):
                    ui.label(made.names[target]).classes("text-sm font-medium")
                    ui.echart(fan_chart(made, target)).classes("w-full h-72").mark("fan")
            with ui.element("div").classes("w-full grid grid-cols-1 xl:grid-cols-2 gap-4"):
                with card("Quantiles"):
                    _show_table(made)
                with card("What the model sees"):
                    _show_views(made)


def _show_table(made: ShownForecast) -> None:
    columns = [{"name": c, "label": c, "field": c, "align": "right"} for c in made.columns]
    rows = [
        {
            name: f"{value:.5g}" if isinstance(value, float) else value
            for name, value in zip(made.columns, row, strict=True)
        }
        for row in made.rows
    ]
    table = ui.table(rows=rows, columns=columns, pagination=12).mark("quantiles")
    table.classes("w-full").props("dense flat bordered")
    quiet_button(
        "Download CSV", lambda: ui.download.content(made.csv, "forecast.csv", "text/csv")
    ).mark("download")


def _show_views(made: ShownForecast) -> None:
    with ui.element("div").classes("w-full grid grid-cols-1 sm:grid-cols-3 gap-3"):
        for name, picture in made.views:
            with ui.column().classes("gap-1 min-w-0"):
                ui.image(picture).classes("w-full aspect-square rounded").props(
                    f'alt="{name}"'
                ).mark("view")
                ui.label(name).classes("text-sm")


def _whole(name: str, value: float | None, least: int) -> int:
    if value is None or value != int(value) or value < least:
        got = "nothing" if value is None else f"{value:g}"
        raise OptionError(f"{name}: expected a whole number of at least {least}, got {got}")
    return int(value)
