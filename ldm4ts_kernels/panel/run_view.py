"""How the shown run goes: its state and buttons, speed, memory, loss curve, scores or its error."""

from nicegui import events, ui

from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.panel.charts import loss_chart
from ldm4ts_kernels.panel.run_state import RunState, find_runs
from ldm4ts_kernels.panel.state import PanelState
from ldm4ts_kernels.panel.widgets import ERROR, FIELD, HINT, card, quiet_button

COLORS = {
    "running": "primary",
    "elsewhere": "primary",
    "finished": "positive",
    "failed": "negative",
    "paused": "warning",
}
SECONDS_BETWEEN_LOOKS = 0.5


class RunView:
    """Draws the run that all browsers share; a timer redraws it when its files have changed."""

    def __init__(self, panel: PanelState) -> None:
        self.panel, self.settings = panel, panel.settings
        self.drawn: tuple[int, str] | None = None
        with card("Progress"):
            self._build()
        ui.timer(SECONDS_BETWEEN_LOOKS, self.refresh)

    def _build(self) -> None:
        with ui.row().classes("w-full items-center gap-3"):
            # Not bound to the setting: a select refuses a run that it has not heard of yet.
            self.runs = ui.select([], label="Run", on_change=self._choose).mark("run")
            self.runs.classes(FIELD).props("outlined dense options-dense")
            self.chip = (
                ui.badge("idle", color="grey-8")
                .mark("state")
                .props("role=status")
                .classes("text-sm p-2")
            )
        with ui.row().classes("gap-2"):
            self.pause = quiet_button("Pause", self._pause).mark("pause")
            self.stop = quiet_button("Stop", self._stop).mark("stop")
            self.resume = quiet_button("Resume", self._resume).mark("resume")
        self.progress = ui.linear_progress(0, show_value=False).props("rounded size=10px")
        self.where = ui.label().classes("text-sm").mark("where")
        self.facts = ui.element("div").classes("w-full grid grid-cols-2 gap-x-6 gap-y-1 text-sm")
        self.error = ui.label().classes(f"{ERROR} whitespace-pre-wrap")
        self.error.mark("run-error").props("role=alert")
        self.curve_title = ui.label("Loss").classes("text-sm font-medium")
        self.chart = ui.echart({}).classes("w-full h-64").mark("loss")
        self.scores = ui.table(rows=[], columns=[]).props("dense flat bordered hide-bottom")
        self.scores.classes("w-full").mark("scores")
        with ui.expansion("Attention, layer by layer").classes("w-full") as self.layers:
            columns = [
                {"name": name, "label": name, "field": name, "align": "left"}
                for name in ("backend", "layer")
            ]
            self.served = ui.table(rows=[], columns=columns, pagination=10).mark("layers")
            self.served.classes("w-full").props("dense flat bordered")

    def refresh(self) -> None:
        """Draw again if the run, its files or its process have changed."""
        self.panel.look()
        state = self._state()
        if self.drawn == (self.panel.changes, state):
            return
        self.drawn = self.panel.changes, state
        self._offer_runs()
        shown = self.panel.shown
        self.chip.text = state
        self.chip.props(f"color={COLORS.get(state, 'grey-8')}")
        ours = self.settings.run == self.panel.job.name
        self.pause.set_enabled(ours and state == "running")
        self.stop.set_enabled(ours and state in ("running", "paused"))
        self.resume.set_enabled(shown is not None and state in ("paused", "stopped", "failed"))
        self.error.text = self.panel.job.error if ours else ""
        self.error.visible = bool(self.error.text)
        self._draw(shown, state)

    def _state(self) -> str:
        """Return the job's state, or what the files say of a run that is not the job's."""
        if self.settings.run and self.settings.run == self.panel.job.name:
            return self.panel.job.state
        return "idle" if self.panel.shown is None else self.panel.shown.state

    def _offer_runs(self) -> None:
        names = find_runs(self.panel.root)
        current = self.settings.run
        if current and current not in names:
            names.insert(0, current)
        self.runs.set_options(names, value=current or None)

    def _draw(self, shown: RunState | None, state: str) -> None:
        self.facts.clear()
        for element in (self.curve_title, self.chart, self.scores, self.layers):
            element.visible = False
        if shown is None:
            self.progress.value = 0
            self.where.text = "Starting …" if state == "running" else "No run yet."
            return
        self.progress.value = shown.progress
        self.where.text = describe_position(shown, state)
        with self.facts:
            for name, value in describe_facts(shown, self.panel.estimate_of(shown)).items():
                ui.label(name).classes(HINT)
                ui.label(value).mark(f"fact-{name}")
        curves = shown.curve("autoencoder"), shown.curve("forecaster")
        if any(curves):
            self.chart.visible = self.curve_title.visible = True
            self.chart.options.clear()
            self.chart.options.update(loss_chart(*curves))
            self.chart.update()
        self._draw_scores(shown)
        self.layers.visible = bool(shown.layers)
        self.served.rows = [
            {"layer": name, "backend": server} for name, server in shown.layers.items()
        ]

    def _draw_scores(self, shown: RunState) -> None:
        scores = shown.scores["scores"] if shown.scores else shown.validation
        if scores is None:
            return
        title = "test" if shown.scores else "validation"
        measures = list(next(iter(scores.values())))
        columns = [{"name": "who", "label": title, "field": "who", "align": "left"}]
        columns += [{"name": m, "label": m.upper(), "field": m} for m in measures]
        self.scores.columns = columns
        self.scores.rows = [
            {"who": who, **{m: f"{value:.4f}" for m, value in row.items()}}
            for who, row in scores.items()
        ]
        self.scores.visible = True

    def _choose(self, event: events.ValueChangeEventArguments) -> None:
        if event.value and event.value != self.settings.run:
            self.settings.run = event.value
            self.refresh()

    def _pause(self) -> None:
        self.panel.job.pause()
        self.refresh()

    def _stop(self) -> None:
        self.panel.job.stop()
        self.refresh()

    def _resume(self) -> None:
        try:
            self.panel.job.resume(self.settings.run)
        except OptionError as error:
            ui.notify(f"{error}", type="negative")
        self.refresh()


def describe_position(shown: RunState, state: str) -> str:
    """Say the stage and step, and the time left in the stage."""
    last = shown.last
    if shown.scores is not None:
        return f"Tested on {shown.scores['windows']} windows."
    if last is None:
        return "Starting …" if state == "running" else "No step yet."
    where = f"{last['stage'].capitalize()}, step {last['step']:,} of {last['steps']:,}"
    if last["stage"] == "forecaster" and last["step"] == last["steps"] and state == "running":
        return f"{where}. Testing …"
    left = shown.seconds_left
    if state == "elsewhere":
        where += ", by another process"
    if left is None or state not in ("running", "elsewhere"):
        return where
    return f"{where}; {describe_seconds(left)} left in this stage"


def describe_facts(shown: RunState, estimated_gib: float | None) -> dict[str, str]:
    """Return what is measured: loss, speed, memory beside its estimate, who serves attention."""
    last = shown.last or {}
    facts = {name: f"{value:.4f}" for name, value in last.get("losses", {}).items()}
    if last.get("steps_per_second"):
        facts["steps/s"] = f"{last['steps_per_second']:.2f}"
    measured = "no GPU" if shown.peak_gib is None else f"{shown.peak_gib:.2f} GiB allocated"
    facts["VRAM measured"] = measured
    if estimated_gib is not None:
        facts["VRAM estimated"] = f"{estimated_gib:.2f} GiB with context and reserve"
    facts["attention"] = last.get("attention") or "–"
    return facts


def describe_seconds(seconds: float) -> str:
    """Write a time as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
