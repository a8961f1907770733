"""The few widgets that the tabs share, so that they look and behave alike."""

from collections.abc import Callable, Mapping
from typing import Any

from nicegui import ui

FIELD = "w-full sm:w-56"
INPUT = "outlined dense hide-bottom-space stack-label"
ERROR = "text-sm text-red-700 dark:text-red-400 break-words"
HINT = "text-sm text-neutral-600 dark:text-neutral-400"
LARGEST_UPLOAD = 512 * 2**20  # bytes


def card(title: str) -> ui.column:
    """Open a titled card that fills its cell of the grid."""
    with ui.card().classes("w-full min-w-0").props("flat bordered"):
        ui.label(title).classes("text-lg font-medium").props("role=heading aria-level=2")
        return ui.column().classes("w-full gap-3 min-w-0")


def number(label: str, settings: Any, name: str, **options: Any) -> ui.number:
    """Return a number field bound to a setting; empty is None."""
    field = ui.number(label, **options).bind_value(settings, name).without_auto_validation()
    return field.classes(FIELD).props(INPUT).mark(name)


def choice(label: str, settings: Any, name: str, options: Any) -> ui.select:
    """Return a drop-down bound to a setting."""
    field = ui.select(options, label=label, value=getattr(settings, name))
    field.bind_value(settings, name).without_auto_validation()
    return field.classes(FIELD).props("outlined dense options-dense hide-bottom-space").mark(name)


def text(label: str, settings: Any, name: str) -> ui.input:
    """Return a text field bound to a setting."""
    field = ui.input(label).bind_value(settings, name).without_auto_validation()
    return field.classes(FIELD).props(INPUT).mark(name)


def quiet_button(label: str, on_click: Callable[[], Any] | None = None) -> ui.button:
    """Return a button that is not the main one of its card, readable on white and on black."""
    button = ui.button(label, on_click=on_click, color=None)
    return button.classes("text-blue-800 dark:text-blue-300").props(
        'outline no-caps padding="4px 12px"'
    )


def csv_upload(on_upload: Callable[..., Any]) -> ui.upload:
    """Return a place for a CSV file: a button that the keyboard reaches, and a field to drop on."""
    with ui.row().classes("w-full items-center gap-3"):
        button = quiet_button("Choose a CSV file")
        upload = ui.upload(auto_upload=True, max_file_size=LARGEST_UPLOAD).on_upload(on_upload)
    upload.on_rejected(lambda: ui.notify("Not taken: expected a .csv file up to 512 MiB."))
    upload.classes("grow csv-upload").props('accept=".csv,text/csv" flat bordered')
    # In the browser: a file dialog opens at the user's own click alone.
    button.on("click", js_handler=f"() => getElement({upload.id}).$refs.qRef.pickFiles()")
    return upload


def show_errors(fields: Mapping[str, Any], message: str, rest: ui.label) -> None:
    """Say an error `name: ...` beneath the field of that name, any other in the label `rest`."""
    name, _, said = message.partition(": ")
    for own, field in fields.items():
        field.error = said if own == name else None
    rest.text = "" if name in fields else message
