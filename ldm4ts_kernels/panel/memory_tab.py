"""The tab Memory Optimization: attention, checkpointing, precision, and their sum in GiB."""

from typing import Any

from nicegui import background_tasks, ui

from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.doctor import BackendFinding
from ldm4ts_kernels.panel.estimates import Question
from ldm4ts_kernels.panel.memory_bar import MemoryBar
from ldm4ts_kernels.panel.settings import ATTENTION, CARDS_GB
from ldm4ts_kernels.panel.state import PanelState
from ldm4ts_kernels.panel.widgets import (
    card,
    choice,
    number,
    quiet_button,
    show_errors,
)
from ldm4ts_kernels.panel.worker import WorkerError
from ldm4ts_kernels.vram import LARGEST_BATCH, PRECISIONS

CHAIN_OF = {"sage": "int8", "flash": "exact", "auto": "exact"}
PRESETS = {"guide": "guide (142 M U-Net)", "paper": "paper (a small one)"}
MODES = {"full": "full: recompute each block", "selective": "selective: keep attention"}
OPTIMIZER_LABELS = {"adamw": "AdamW", "adamw8bit": "AdamW, 8-bit states (torchao)"}
GOOD = "text-green-700 dark:text-green-400"
BAD = "text-red-700 dark:text-red-400"
PLAIN = "text-neutral-600 dark:text-neutral-400"


class MemoryTab:
    """The controls, the estimate that follows them, and the recommended cards."""

    def __init__(self, panel: PanelState) -> None:
        self.panel, self.settings = panel, panel.settings
        self.cards: dict[int, tuple[ui.label, ui.button]] = {}
        self.fields: dict[str, Any] = {}
        self.offers: dict[ui.button, dict[str, Any]] = {}  # settings that a click takes
        with ui.element("div").classes("w-full grid grid-cols-1 lg:grid-cols-2 gap-4 items-start"):
            with card("Settings"):
                self._build_controls()
            with card("Estimated VRAM of training"):
                self._build_estimate()
        with card("Recommended for a card of"):
            self._build_cards()
        self.refresh()

    def _build_controls(self) -> None:
        with ui.row().classes("w-full gap-3"):
            for label, name, choices in (
                ("Attention backend", "attention", ATTENTION),
                ("Model preset", "preset", PRESETS),
                ("Precision", "precision", list(PRECISIONS)),
                ("Optimizer", "optimizer", OPTIMIZER_LABELS),
                ("Weights", "weights", list(PRECISIONS)),
            ):
                self.fields[name] = choice(label, self.settings, name, choices)
            for label, name, limits in (
                ("Batch size", "batch_size", {"min": 1, "max": LARGEST_BATCH, "step": 1}),
                ("Image size (px)", "image_size", {"min": 16, "max": 1024, "step": 16}),
                ("Card (GB of VRAM)", "card_gb", {"min": 1, "max": 512, "step": 1}),
            ):
                self.fields[name] = number(label, self.settings, name, **limits)
        for name, field in self.fields.items():
            field.on_value_change(self._change_preset if name == "preset" else self.refresh)
        with ui.row().classes("w-full gap-3 items-center"):
            checkpointing = ui.switch("Gradient checkpointing").mark("gradient_checkpointing")
            checkpointing.bind_value(self.settings, "gradient_checkpointing")
            checkpointing.on_value_change(self.refresh)
            mode = choice("Mode", self.settings, "checkpointing", MODES)
            mode.on_value_change(self.refresh).bind_enabled_from(
                self.settings, "gradient_checkpointing"
            )
            in_backward = ui.switch("Optimizer in backward").mark("optimizer_in_backward")
            in_backward.bind_value(self.settings, "optimizer_in_backward")
            in_backward.on_value_change(self.refresh)
        with ui.column().classes("w-full gap-1").mark("availability"):
            for name, label in ATTENTION.items():
                said = f"{label}: {describe_attention(self.panel, name)}"
                ui.label(said).classes("text-sm break-words")
        with ui.expansion("Attention backends of this machine").classes("w-full") as expansion:
            expansion.mark("backends")
            for finding in self.panel.diagnosis.backends:
                _show_backend(finding)

    def _build_estimate(self) -> None:
        with ui.row().classes("items-baseline gap-2"):
            self.total = ui.label().classes("text-3xl font-medium").mark("total")
            self.spinner = ui.spinner(size="sm")
        self.verdict = ui.label().classes("text-sm").mark("verdict").props("role=status")
        self.lever = ui.label().classes("text-sm").mark("lever")
        self.apply = self._offer_button("Use these settings").mark("apply")
        self.bar = MemoryBar()
        ui.label(
            "Traced from the model's own tensors; held to 80 measurements on one NVIDIA H200, "
            "other GPUs differ."
        ).classes("text-xs text-neutral-600 dark:text-neutral-400")

    def _build_cards(self) -> None:
        with ui.element("div").classes(
            "w-full grid grid-cols-1 sm:grid-cols-2 xl:grid-cols-4 gap-3"
        ):
            for card_gb in CARDS_GB:
                with ui.card().classes("w-full").props("flat bordered"):
                    ui.label(f"{card_gb} GB").classes("text-base font-medium")
                    said = ui.label("…").classes("text-sm grow").mark(f"card-{card_gb}")
                    button = self._offer_button("Use").mark(f"use-{card_gb}")
                    button.set_enabled(False)
                    self.cards[card_gb] = said, button

    def _change_preset(self) -> None:
        self.settings.image_size = 224 if self.settings.preset == "guide" else 64
        self.refresh()

    def refresh(self) -> None:
        """Show the estimate of the current settings: now if it is known, else when traced."""
        try:
            question, batch = self.settings.estimate_question(), self.settings.batch()
            self.settings.check_levers()
        except OptionError as error:
            show_errors(self.fields, f"{error}", self.verdict)
            self._say("–", f"{error}", BAD)
            return
        show_errors(self.fields, "", self.verdict)
        known = self.panel.estimates.look_up(question)
        if known is not None:
            self._show(known[str(batch)])
        else:
            self._say("…", "Tracing this model for the first time, which may take a minute.", PLAIN)
            self.spinner.visible = True
            background_tasks.create(self._trace(question))
        background_tasks.create(self._show_cards())

    async def _trace(self, question: Question) -> None:
        error = ""
        try:
            await self.panel.estimates.ask(question)
        except WorkerError as failed:
            error = f"{failed}"
        if self.total.is_deleted or question != self._question():
            return  # the user went on
        if error:
            self._say("–", error, BAD)
        else:
            self.refresh()

    def _question(self) -> Question | None:
        """Return what is asked now; None while a field is wrong."""
        try:
            return self.settings.estimate_question()
        except OptionError:
            return None

    def _say(self, total: str, verdict: str, color: str) -> None:
        self.total.text, self.verdict.text = total, verdict
        for label in (self.total, self.verdict):
            label.classes(replace="text-sm" if label is self.verdict else "text-3xl font-medium")
            label.classes(color)
        self.lever.text = ""
        self.apply.visible = self.spinner.visible = False
        self.bar.clear()

    def _show(self, estimate: dict[str, Any]) -> None:
        total, saved = estimate["total_estimated_gb"], estimate["savings_vs_default_pct"]
        card_gb = self.settings.card_gb
        active = (
            estimate["backend"] != "default"
            or estimate["gradient_checkpointing"] != "none"
            or estimate["optimizer"] != "adamw"
            or estimate["optimizer_in_backward"]
        )
        said = f"{saved:.0f} % below default attention without checkpointing" if active else (
            "No optimisation is active"
        )  # fmt: skip
        too_much = card_gb is not None and total > card_gb
        if card_gb is not None and too_much:
            said = f"{total - card_gb:.2f} GiB more than the card has. {said}."
        self._say(f"{total:.2f} GiB", said, BAD if too_much else GOOD if active else PLAIN)
        self.bar.show(estimate["bytes"], card_gb)
        if card_gb is not None and too_much:
            self.lever.text = "Looking for what would make it fit …"
            background_tasks.create(self._show_lever(card_gb, estimate["batch_size"]))

    async def _ask(self, question: Question) -> dict[str, Any]:
        """Return a recommendation, or why there is none."""
        try:
            return await self.panel.estimates.ask(question)
        except WorkerError as error:
            return {"nothing_fits": f"{error}"}

    async def _show_lever(self, card_gb: float, batch: int) -> None:
        """Say the first settings that fit the card, as `ldm4ts recommend` finds them."""
        question = self.settings.card_question(card_gb, batch)
        found = await self._ask(question)
        now = self.settings.card_gb, self.settings.batch_size
        if self.lever.is_deleted or now != (card_gb, batch):
            return  # the user went on
        if "nothing_fits" in found:
            self.lever.text = found["nothing_fits"]
            return
        fits = found["batch_size"] >= batch
        levers = describe_levers(found)
        self.lever.text = (
            f"Fits with {levers}."
            if fits
            else f"Most windows: {found['batch_size']}, with {levers}."
        )
        wanted = batch if fits else found["batch_size"]
        self._offer(self.apply, found, wanted)

    async def _show_cards(self) -> None:
        """Ask for each card in turn; what is known already comes at once."""
        questions = {card_gb: self.settings.card_question(card_gb) for card_gb in CARDS_GB}
        for card_gb, question in questions.items():
            label, button = self.cards[card_gb]
            if self.panel.estimates.look_up(question) is None:
                label.text = "tracing …"
                button.set_enabled(False)
            found = await self._ask(question)
            if label.is_deleted or question != self.settings.card_question(card_gb):
                return  # another model by now
            if "nothing_fits" in found:
                label.text = found["nothing_fits"]
                continue
            label.text = (
                f"{describe_levers(found)}, batch {found['batch_size']}: "
                f"{found['estimated_gb']:.2f} GiB"
            )
            self._offer(button, found, found["batch_size"], card_gb)

    def _offer(
        self, button: ui.button, found: dict[str, Any], batch: int, card_gb: float | None = None
    ) -> None:
        """Make a click on the button take the settings that were found."""
        self.offers[button] = {
            "attention": found["attention_backend"],
            "precision": found["precision"],
            "gradient_checkpointing": found["gradient_checkpointing"],
            "checkpointing": "full",
            "optimizer": found["optimizer"],
            "optimizer_in_backward": found["optimizer_in_backward"],
            "weights": found["weights"],
            "batch_size": batch,
            "card_gb": card_gb or self.settings.card_gb,
        }
        button.set_enabled(True)
        button.visible = True

    def _offer_button(self, label: str) -> ui.button:
        def take() -> None:
            for name, value in self.offers[button].items():
                setattr(self.settings, name, value)

        button = quiet_button(label, take)
        return button


def describe_levers(found: dict[str, Any]) -> str:
    """Name the settings of a recommendation."""
    checkpointing = "" if found["gradient_checkpointing"] else "no "
    attention = ATTENTION[found["attention_backend"]]
    levers = f"{attention}, {found['precision']}, {checkpointing}gradient checkpointing"
    if found["optimizer"] != "adamw":
        levers += f", 8-bit optimizer states, {found['weights']} weights"
    return levers + (", optimizer in backward" if found["optimizer_in_backward"] else "")


def describe_attention(panel: PanelState, attention: str) -> str:
    """Say who would serve the chosen attention here, or why it is not available."""
    if attention == "default":
        return "available, with the scores in memory; the baseline of every saving."
    rows = [row for row in panel.diagnosis.backends if row.precision == CHAIN_OF[attention]]
    chosen = next((row for row in rows if row.chosen), None)
    if chosen is not None and (attention != "sage" or chosen.name != "sdpa"):
        whose = ", PyTorch's own fused attention" if chosen.name == "sdpa" else ""
        return f"available, served by {chosen.name}{whose}."
    able = [row.name for row in rows if row.trains and row.name != "sdpa"]
    if able:
        return f"computes exactly, with sdpa; INT8 by name alone ({', '.join(able)})."
    return "not available for training here: the reasons are below. sdpa computes exactly instead."


def _show_backend(finding: BackendFinding) -> None:
    """Show one backend: whether it serves, why not, and the command that would install it."""
    color = GOOD if finding.chosen else "" if finding.trains else PLAIN
    verdict = "serves" if finding.chosen else "by name" if finding.trains else "not here"
    with ui.column().classes("w-full gap-0 py-1"):
        ui.label(f"{finding.name} ({finding.precision}): {verdict}").classes(f"text-sm {color}")
        if finding.reasons:
            ui.label("; ".join(finding.reasons)).classes(
                "text-xs text-neutral-600 dark:text-neutral-400 break-words"
            )
        if finding.fix:
            ui.label(finding.fix).classes("text-xs font-mono break-all")
