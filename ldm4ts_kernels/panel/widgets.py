"""The few widgets that the tabs share, so that they look and behave alike."""

from collections.abc import Callable
from typing import Any

from nicegui import ui

FIELD = "w-full sm:w-56"


def card(title: str) -> ui.column:
    """Open a titled card that fills its cell of the grid."""
    with ui.card().classes("w-full min-w-0").props("flat bordered"):
        ui.label(title).classes("text-lg font-medium").props("role=heading aria-level=2")
        return ui.column().classes("w-full gap-3 min-w-0")


def number(label: str, settings: Any, name: str, **options: Any) -> ui.number:
    """Return a number field bound to a setting; empty is None."""
    field = ui.number(label, **options).bind_value(settings, name)
    return field.classes(FIELD).props("outlined dense hide-bottom-space stack-label").mark(name)


def choice(label: str, settings: Any, name: str, options: Any) -> ui.select:
    """Return a drop-down bound to a setting."""
    field = ui.select(options, label=label, value=getattr(settings, name))
    field.bind_value(settings, name)
    return field.classes(FIELD).props("outlined dense options-dense").mark(name)


def text(label: str, settings: Any, name: str) -> ui.input:
    """Return a text field bound to a setting."""
    field = ui.input(label).bind_value(settings, name)
    return field.classes(FIELD).props("outlined dense hide-bottom-space stack-label").mark(name)


def quiet_button(label: str, on_click: Callable[[], Any]) -> ui.button:
    """Return a button that is not the main one of its card, readable on white and on black."""
    button = ui.button(label, on_click=on_click, color=None)
    return button.classes("text-blue-800 dark:text-blue-300").props(
        'outline no-caps padding="4px 12px"'
    )


def show_error(field: Any, message: str) -> None:
    """Mark a field as wrong and say why beneath it; an empty message takes the mark away."""
    field.props(remove="error error-message")
    if message:
        field.props["error"] = True
        field.props["error-message"] = message
    field.update()
