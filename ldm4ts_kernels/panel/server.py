"""The panel's page and its server: three tabs, one state, a gate before everything."""

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from nicegui import app, background_tasks, ui

from ldm4ts_kernels import __version__
from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.panel.access import AccessGate, check_exposure
from ldm4ts_kernels.panel.forecast_tab import ForecastTab
from ldm4ts_kernels.panel.memory_tab import MemoryTab
from ldm4ts_kernels.panel.state import PanelState
from ldm4ts_kernels.panel.training_tab import TrainingTab

# The original guide's path: Generative Forecast, LDM4TS Training, Memory Optimization.
TABS = {
    "Generative Forecast": ForecastTab,
    "LDM4TS Training": TrainingTab,
    "Memory Optimization": MemoryTab,
}
TITLE = "LDM4TS"
STYLE = """
.nicegui-content { padding: 0; }
.q-tab { text-transform: none; }
:focus-visible { outline: 2px solid #3b82f6; outline-offset: 2px; }
.body--dark { color-scheme: dark; }
body .q-btn.disabled { opacity: 0.45 !important; }
body .q-field__messages { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
.body--dark .q-field--error { --q-negative: #f87171; }
.csv-upload .q-uploader__header { display: none; }
.csv-upload .q-uploader__list { min-height: 36px; padding: 8px; }
.csv-upload .q-uploader__list:empty::before { content: "or drop it here"; opacity: 0.7; }
"""


def build_page(panel: PanelState) -> None:
    """Lay out the page for one browser. The address keeps the tab, so that a reload stays there."""
    ui.add_css(STYLE)
    ui.colors(primary="#1d4ed8", positive="#15803d", negative="#b91c1c", warning="#b45309")
    dark = ui.dark_mode(None)
    chosen = ui.context.client.request.query_params.get("tab", "")
    with ui.header().classes("items-center gap-x-4 gap-y-0 py-1"):
        ui.label(TITLE).classes("text-lg font-medium").props("role=heading aria-level=1")
        ui.label(__version__).classes("text-xs opacity-70 grow")
        with ui.button(icon="contrast", on_click=lambda: _switch(dark)).props(
            'flat round color=white aria-label="Dark or light"'
        ):
            ui.tooltip("Dark or light")
        with (
            ui.tabs(on_change=_keep_tab)
            .classes("w-full")
            .props("align=left outside-arrows mobile-arrows") as tabs
        ):
            for name in TABS:
                ui.tab(name).mark(f"tab-{name}")
    first = chosen if chosen in TABS else next(iter(TABS))
    with ui.tab_panels(tabs, value=first).classes("w-full bg-transparent max-w-screen-2xl mx-auto"):
        for name, build in TABS.items():
            with ui.tab_panel(name).classes("gap-4 p-3 sm:p-4"):
                build(panel)


def _switch(dark: ui.dark_mode) -> None:
    """Go from the system's choice to dark, and from there between dark and light."""
    dark.value = not dark.value


def _keep_tab(event: object) -> None:
    ui.navigate.history.replace(f"?tab={getattr(event, 'value', '')}")


def create_app(panel: PanelState, host: str, port: int, token: str | None) -> AccessGate:
    """Return the panel as an ASGI app behind its gate. Raises OptionError as check_exposure."""
    check_exposure(host, token)
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.on_startup
    def prepare() -> None:
        background_tasks.create(panel.prepare(), name="prepare")

    app.on_shutdown(panel.close)
    ui.run_with(
        application,
        root=lambda: build_page(panel),
        title=TITLE,
        dark=None,
        show_welcome_message=False,
    )
    return AccessGate(application, token, port)


class _Server(uvicorn.Server):
    """Ends on a signal without raising it again, which would end the command in a traceback."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # a second Ctrl-C waits for nothing
        self.should_exit = True


def serve(
    root: Path, host: str, port: int, token: str | None, on_ready: Callable[[int], None]
) -> None:
    """Serve the panel until Ctrl-C; a run that is training then stops with a checkpoint.

    on_ready is called with the port once it is taken; port 0 takes a free one. Raises OptionError
    for a port that is not to be had, and as check_exposure.
    """
    check_exposure(host, token)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OptionError(
            f"port: cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}"
        ) from error
    port = listening.getsockname()[1]
    gate = create_app(PanelState(root), host, port, token)
    config = uvicorn.Config(
        gate,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2,  # seconds that open pages are waited for
    )
    on_ready(port)
    with warnings.catch_warnings():
        # NiceGUI looks for a server among all objects alive; one of torch's complains of the look.
        warnings.filterwarnings("ignore", "`torch.distributed.reduce_op`", FutureWarning)
        _Server(config).run([listening])
