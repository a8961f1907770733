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
from ldm4ts_kernels.panel.uploads import keep_upload
from ldm4ts_kernels.panel.widgets import (
    ERROR,
    FIELD,
    HINT,
    INPUT,
    card,
    csv_upload,
    quiet_button,
    show_errors,
)
from ldm4ts_kernels.panel.worker import WorkerError

DEFAULT_SAMPLES = 100
NEWEST = "finished, or newest"


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
            made = ui.number(label, value=value, step=1, **options).without_auto_validation()
            return made.classes(FIELD).mark(name).props(INPUT)

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
        self.fields = {
            "samples": self.samples,
            "sampling_steps": self.sampling_steps,
            "hold_out": self.hold_out,
        }
        with ui.expansion("Another series with the same columns").classes("w-full"):
            self.upload = csv_upload(self._take_file)
            self.file = ui.label().classes(f"{HINT} break-all")
            self.forget = quiet_button("Back to the run's own series", self._forget_file)
            self.forget.visible = False
        with ui.row().classes("items-center gap-3"):
            self.button = ui.button("Forecast", on_click=self._forecast).mark("forecast")
            self.button.props("no-caps unelevated")
            self.spinner = ui.spinner(size="sm")
            self.spinner.visible = False
        self.hint = ui.label().classes(HINT).mark("forecast-hint")
        self.error = ui.label().classes(ERROR).mark("forecast-error").props("role=alert")

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
        self.hint.text = "" if names else "No run yet: train one in the next tab."

    async def _take_file(self, event: events.UploadEventArguments) -> None:
        self.path = await keep_upload(event.file, self.panel.root)
        self.upload.reset()
        self.file.text = f"Forecasting {event.file.name}"
        self.forget.visible = True

    def _forget_file(self) -> None:
        self.path, self.file.text, self.forget.visible = None, "", False

    async def _forecast(self) -> None:
        show_errors(self.fields, "", self.error)
        self.spinner.visible = True
        self.button.set_enabled(False)
        try:
            made = await self.panel.forecaster.ask("forecast", self._arguments())
        except (OptionError, WorkerError) as error:
            show_errors(self.fields, f"{error}", self.error)
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
                for target, name in enumerate(made.names):
                    ui.label(f"{name}; the bands hold so many of the draws").classes("text-sm")
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
