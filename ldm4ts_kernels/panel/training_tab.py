"""The tab LDM4TS Training: choose data, start, pause, stop and resume, and watch the run."""

import asyncio
from pathlib import Path
from typing import Any

from nicegui import events, ui

from ldm4ts_kernels.data import DATASETS, OptionError
from ldm4ts_kernels.panel.data_check import DataCheck, check_data, preview
from ldm4ts_kernels.panel.run_view import RunView
from ldm4ts_kernels.panel.state import PanelState
from ldm4ts_kernels.panel.uploads import keep_upload
from ldm4ts_kernels.panel.widgets import (
    ERROR,
    HINT,
    card,
    choice,
    csv_upload,
    number,
    show_errors,
    text,
)

DATA_LABELS = {
    "sp500": "S&P 500, daily (built in)",
    "nasdaq": "NASDAQ, daily (built in)",
    "etth1": "ETTh1 (upload ETTh1.csv)",
    "etth2": "ETTh2 (upload ETTh2.csv)",
    "csv": "A CSV file of yours (upload)",
}


class TrainingTab:
    """What a run is started with, beside how it goes."""

    def __init__(self, panel: PanelState) -> None:
        self.panel, self.settings = panel, panel.settings
        self.checks = 0
        with ui.element("div").classes("w-full grid grid-cols-1 lg:grid-cols-2 gap-4"):
            with ui.column().classes("gap-4 min-w-0"):
                with card("Data"):
                    self._build_data()
                with card("Run"):
                    self._build_run()
            self.view = RunView(panel)
        ui.timer(0, self.check, once=True)

    def _build_data(self) -> None:
        labels = {name: DATA_LABELS.get(name, name) for name in DATASETS}
        choice("Data set", self.settings, "data", labels).classes("sm:w-full").on_value_change(
            self.check
        )
        with ui.column().classes("w-full gap-1") as self.own_file:
            self.upload = csv_upload(self._take_file).mark("upload")
            self.file = ui.label().classes(f"{HINT} break-all")
        with ui.row().classes("w-full gap-3"):
            fields = (
                text("Timestamp column", self.settings, "timestamp"),
                text("Columns to forecast", self.settings, "targets"),
                text("Input columns", self.settings, "columns"),
                number("History (rows)", self.settings, "history", min=2, step=1),
                text("Horizons (rows ahead)", self.settings, "horizons"),
                number("Season (rows)", self.settings, "period", min=1, step=1),
            )
        names = ("timestamp", "targets", "columns", "history", "horizons", "period")
        self.fields = dict(zip(names, fields, strict=True))
        for field in fields:
            field.props("debounce=300").on_value_change(self.check)
        self.summary = ui.label().classes("text-sm").mark("data-summary").props("role=status")
        self.problem = ui.label().classes(ERROR).mark("data-error").props("role=alert")
        self.preview = ui.element("div").classes("w-full overflow-x-auto")

    def _build_run(self) -> None:
        with ui.row().classes("w-full gap-3"):
            self.run_fields: dict[str, Any] = {
                "name": text("Name of the run", self.settings, "name")
            }
            for label, name in (("Steps", "steps"), ("Autoencoder steps", "autoencoder_steps")):
                self.run_fields[name] = number(
                    label, self.settings, name, min=1, step=1, placeholder="the preset's"
                )
        ui.label(
            "Attention, checkpointing, precision, batch and image size are those of Memory "
            "Optimization."
        ).classes(HINT)
        self.start = ui.button("Start training", on_click=self._start).mark("start")
        self.start.props("no-caps unelevated")
        self.start_error = ui.label().classes(ERROR).mark("start-error").props("role=alert")

    async def check(self) -> None:
        """Load the data as training will, and put the loader's error beside its field."""
        self.checks += 1
        this = self.checks
        needs_file = DATASETS[self.settings.data].needs_path
        self.own_file.visible = needs_file
        self.file.text = Path(self.settings.data_path).name if self.settings.data_path else ""
        self._show_defaults()
        found = await self._load()
        if this != self.checks:
            return  # the user went on
        show_errors(self.fields, found.error, self.problem)
        self.summary.text = found.summary
        self._show_preview(self.settings.data_path if needs_file else "")

    def _show_defaults(self) -> None:
        """Write in the empty fields what the data set does unless told otherwise."""
        row = DATASETS[self.settings.data]
        steps = row.horizons
        rising = len(steps) > 3
        defaults = {
            "timestamp": row.timestamp or "a column's name",
            "targets": ",".join(row.targets or ()) or "columns' names",
            "columns": ",".join(row.columns or ()) or "all but the timestamp",
            "history": row.history,
            "horizons": f"{steps[0]}-{steps[-1]}" if rising else ",".join(map(str, steps)),
            "period": row.period,
        }
        for name, value in defaults.items():
            self.fields[name].props["placeholder"] = str(value)
            self.fields[name].update()

    async def _load(self) -> DataCheck:
        try:
            config = self.settings.data_config()
        except OptionError as error:
            return DataCheck(error=f"{error}")
        return await asyncio.to_thread(check_data, config)

    def _show_preview(self, path: str) -> None:
        self.preview.clear()
        table = preview(path) if path else None
        if table is None:
            return
        columns = [{"name": c, "label": c, "field": c, "align": "left"} for c in map(str, table)]
        with self.preview:
            ui.table(rows=table.fillna("").to_dict("records"), columns=columns).props(
                "dense flat bordered"
            ).mark("preview")

    async def _take_file(self, event: events.UploadEventArguments) -> None:
        """Keep the file with the runs, where resuming and forecasting find it again."""
        self.settings.data_path = await keep_upload(event.file, self.panel.root)
        self.upload.reset()
        await self.check()

    def _start(self) -> None:
        try:
            name = self.settings.name.strip()
            options = self.settings.run_options(str(self.panel.root / name))
            self.panel.job.start(name, options)
        except OptionError as error:
            show_errors(self.run_fields, f"{error}", self.start_error)
            return
        show_errors(self.run_fields, "", self.start_error)
        self.settings.run = name
        self.view.refresh()
