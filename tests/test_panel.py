"""The panel's page without a browser: every control, the estimate, the errors beside the fields."""

import asyncio
import functools
import json
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_run import write_series

pytest.importorskip("nicegui")

from nicegui import ui
from nicegui.testing import User
from nicegui.testing.user_simulation import user_simulation

from ldm4ts_kernels.doctor import diagnose_elsewhere
from ldm4ts_kernels.panel.data_check import check_data
from ldm4ts_kernels.panel.estimates import Estimates, Question
from ldm4ts_kernels.panel.forecast_tab import NEWEST
from ldm4ts_kernels.panel.questions import answer
from ldm4ts_kernels.panel.server import TABS, build_page
from ldm4ts_kernels.panel.settings import CARDS_GB
from ldm4ts_kernels.panel.state import PanelState
from ldm4ts_kernels.panel.worker import WorkerError
from ldm4ts_kernels.training_memory import GIB
from ldm4ts_kernels.vram import estimate_vram_usage


def total_of(arguments: dict[str, object], batch: int) -> float:
    """Return a made-up estimate in GiB: default attention and large batches take more."""
    default = 4 if arguments["backend"] == "default" else 1
    kept = {"full": 0.25, "selective": 0.5, "none": 1.0}[arguments["gradient_checkpointing"]]
    return (1 if arguments["optimizer"] == "adamw8bit" else 2) + batch * default * kept


KEYS = {"backend": "flash", "gradient_checkpointing": "full", "optimizer": "adamw"}
KEYS |= {"optimizer_in_backward": False}


class FakeWorker:
    """Answers as the child process would, at once, with figures that are easy to check."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def ask(self, function: str, arguments: dict[str, object]) -> dict[str, object]:
        self.asked.append(function)
        if function == "recommend":
            if arguments["vram_gb"] < 3:
                return {"nothing_fits": "vram_gb must be at least 3.00 for one window"}
            fits = {"attention_backend": "flash", "precision": "bf16", "batch_size": 5}
            fits |= {"optimizer": "adamw", "weights": "fp32", "optimizer_in_backward": False}
            return {**fits, "gradient_checkpointing": True, "estimated_gb": 5.5, "why": ""}
        found = {}
        for batch in range(1, 65):
            total = total_of(arguments, batch)
            found[f"{batch}"] = {
                **arguments,
                "batch_size": batch,
                "total_estimated_gb": total,
                "savings_vs_default_pct": 100 * (1 - total / (2 + batch * 4)),
                "bytes": {"parameters": GIB, "activations": round((total - 1) * GIB)},
            }
        return found

    def close(self) -> None:
        pass


# Once for all: a process of its own that imports torch.
diagnose = functools.cache(diagnose_elsewhere)


def new_panel(directory: Path) -> PanelState:
    return PanelState(directory, estimates=Estimates(directory / "cache"), diagnosis=diagnose())


@asynccontextmanager
async def open_panel(tmp_path, tab: str = "Memory Optimization"):
    """Yield a simulated browser on a tab, and the state behind the page."""
    panel = new_panel(tmp_path)
    panel.settings.preset, panel.settings.image_size = "guide", 224
    panel.estimates.worker = FakeWorker()
    async with user_simulation(lambda: build_page(panel)) as user:
        await user.open(f"/?tab={tab.replace(' ', '%20')}")
        yield user, panel
        panel.close()


def text_of(user: User, marker: str) -> str:
    (label,) = user.find(marker=marker, kind=ui.label).elements
    return label.text


async def settle(user: User, marker: str, part: str) -> str:
    """Wait until a label says a part; return its text."""
    for _ in range(100):
        if part in text_of(user, marker):
            break
        await asyncio.sleep(0.02)
    assert part in text_of(user, marker)
    return text_of(user, marker)


def test_the_tabs_are_those_of_the_guide(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path) as (user, _):
            for name in TABS:
                await user.should_see(marker=f"tab-{name}")

    assert list(TABS) == ["Generative Forecast", "LDM4TS Training", "Memory Optimization"]
    asyncio.run(body())


def test_the_estimate_follows_every_control(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path) as (user, panel):
            settings = panel.settings
            await settle(user, "total", "3.00 GiB")
            settings.batch_size = 8
            await settle(user, "total", "4.00 GiB")
            settings.checkpointing = "selective"
            await settle(user, "total", "6.00 GiB")
            settings.optimizer = "adamw8bit"
            await settle(user, "total", "5.00 GiB")
            settings.optimizer = "adamw"
            settings.gradient_checkpointing = False
            await settle(user, "total", "10.00 GiB")
            settings.attention = "default"
            settings.card_gb = 40
            await settle(user, "total", "34.00 GiB")
            settings.precision, settings.preset = "bf16", "paper"
            await settle(user, "total", "34.00 GiB")
            assert settings.image_size == 64
            settings.image_size = None
            assert "image_size: expected a whole number" in text_of(user, "verdict")
            settings.image_size = 100
            assert "image_size: expected a multiple of 16, got 100" in text_of(user, "verdict")
            (field,) = user.find(marker="image_size", kind=ui.number).elements
            assert field.error == "expected a multiple of 16, got 100"
            settings.image_size, settings.weights = 64, "bf16"
            assert "weights: expected fp32 with optimizer adamw" in text_of(user, "verdict")
            assert field.error is None

    asyncio.run(body())


def test_the_colour_says_whether_it_saves_and_whether_it_fits(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path) as (user, panel):
            (total,) = user.find(marker="total", kind=ui.label).elements
            await settle(user, "verdict", "83 % below default attention without")
            assert "text-green-700" in total.classes
            panel.settings.attention = "default"
            panel.settings.gradient_checkpointing = False
            panel.settings.card_gb = 100
            await settle(user, "verdict", "No optimisation is active")
            assert "text-neutral-600" in total.classes
            panel.settings.card_gb = 8
            await settle(user, "verdict", "10.00 GiB more than the card has")
            assert "text-red-700" in total.classes

    asyncio.run(body())


def test_what_does_not_fit_names_the_lever_and_a_click_takes_it(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path) as (user, panel):
            panel.settings.attention = "default"
            panel.settings.gradient_checkpointing = False
            said = await settle(user, "lever", "Fits with")
            assert said == "Fits with FlashAttention, bf16, gradient checkpointing."
            user.find(marker="apply").click()
            settings = panel.settings
            assert (settings.attention, settings.precision) == ("flash", "bf16")
            panel.settings.card_gb = 2
            assert "at least 3.00 for one window" in await settle(user, "lever", "vram_gb")

    asyncio.run(body())


def test_more_windows_than_fit_are_offered_as_the_most_that_do(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path) as (user, panel):
            panel.settings.batch_size = 60
            await settle(user, "lever", "Most windows: 5, with FlashAttention, bf16")
            user.find(marker="apply").click()
            assert panel.settings.batch_size == 5

    asyncio.run(body())


def test_each_card_is_a_preset_of_one_click(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path) as (user, panel):
            for card in CARDS_GB:
                await settle(user, f"card-{card}", "batch 5: 5.50 GiB")
                user.find(marker=f"use-{card}").click()
                assert (panel.settings.card_gb, panel.settings.batch_size) == (card, 5)

    asyncio.run(body())


def test_a_recommendation_that_fails_says_why(tmp_path):
    class Broken(FakeWorker):
        async def ask(self, function: str, arguments: dict[str, object]) -> dict[str, object]:
            if function == "recommend":
                raise WorkerError("the process that computes ended (-9); ask again")
            return await super().ask(function, arguments)

    async def body() -> None:
        async with open_panel(tmp_path) as (user, panel):
            panel.estimates.worker = Broken()
            panel.settings.card_gb = 2.5
            await settle(user, "lever", "the process that computes ended")
            panel.settings.image_size = 208
            await settle(user, "card-6", "the process that computes ended")

    asyncio.run(body())


def test_the_answer_is_that_of_the_function():
    arguments = {"preset": "paper", "part": "unet", "backend": "flash", "precision": "fp32"}
    found = answer(json.dumps(["estimate", arguments]))["answer"]
    assert found["17"] == estimate_vram_usage(17, **arguments)
    assert len(found) == 64
    wrong = answer(json.dumps(["estimate", {**arguments, "precision": "fp8"}]))
    assert wrong["error"].startswith("precision must be one of")


def test_an_answer_is_kept_for_the_next_start(tmp_path):
    async def body() -> None:
        question = Question("estimate", tuple(sorted(KEYS.items())))
        first, second = Estimates(tmp_path), Estimates(tmp_path)
        first.worker, second.worker = FakeWorker(), FakeWorker()
        both = await asyncio.gather(first.ask(question), first.ask(question))
        assert first.worker.asked == ["estimate"] and both[0] == both[1]
        assert json.dumps(second.look_up(question)) == json.dumps(both[0])
        for file in tmp_path.rglob("*.json"):
            file.write_text("{")
        assert Estimates(tmp_path).look_up(question) is None

    asyncio.run(body())


def test_the_backends_are_those_of_the_doctor(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path) as (user, panel):
            labels = [element.text for element in user.find(kind=ui.label).elements]
            for finding in panel.diagnosis.backends:
                assert any(f"{finding.name} ({finding.precision}): " in text for text in labels)
                assert not finding.reasons or "; ".join(finding.reasons) in labels
                assert not finding.fix or finding.fix in labels

    asyncio.run(body())


def test_the_loaders_error_stands_beside_its_field(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path, "LDM4TS Training") as (user, panel):
            await settle(user, "data-summary", "5,031 rows")
            (field,) = user.find(marker="targets", kind=ui.input).elements
            panel.settings.targets = "Closing"
            for _ in range(100):
                await asyncio.sleep(0.02)
                if field.error:
                    break
            assert field.error.startswith("no column 'Closing'")
            panel.settings.targets = ""
            await settle(user, "data-summary", "5,031 rows")
            assert field.error is None

    asyncio.run(body())


def test_a_run_that_cannot_start_says_why_beside_the_field_or_the_button(tmp_path):
    async def said_by(field: ui.element, part: str) -> None:
        for _ in range(100):
            if part in (field.error or ""):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(field.error)

    async def body() -> None:
        (tmp_path / "taken").mkdir()
        async with open_panel(tmp_path, "LDM4TS Training") as (user, panel):
            (name,) = user.find(marker="name", kind=ui.input).elements
            (steps,) = user.find(marker="steps", kind=ui.number).elements
            panel.settings.name = "taken"
            user.find(marker="start").click()
            await said_by(name, "resume it or choose another name")
            panel.settings.name, panel.settings.steps = "new", 0
            user.find(marker="start").click()
            await said_by(steps, "expected a whole number from 1")
            assert name.error is None
            panel.settings.steps, panel.settings.weights = None, "bf16"
            user.find(marker="start").click()
            await settle(user, "start-error", "weights: expected fp32 with optimizer adamw")

    asyncio.run(body())


def test_a_failed_run_shows_its_error_and_no_spinner(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path, "LDM4TS Training") as (user, panel):
            panel.job.start("bad", {"data": {"name": "csv", "path": "nowhere.csv"}})
            panel.settings.run = "bad"
            (chip,) = user.find(marker="state", kind=ui.badge).elements
            for _ in range(300):
                await asyncio.sleep(0.1)
                if chip.text == "failed":
                    break
            await settle(user, "run-error", "path: expected a CSV file, got 'nowhere.csv'")

    asyncio.run(body())


def test_without_a_run_the_forecast_says_what_to_do(tmp_path):
    async def body() -> None:
        async with open_panel(tmp_path, "Generative Forecast") as (user, _):
            await settle(user, "forecast-hint", "No run yet: train one in the next tab.")
            (button,) = user.find(marker="forecast", kind=ui.button).elements
            assert not button.enabled

    asyncio.run(body())


def test_a_runs_checkpoints_are_offered_and_the_one_chosen_is_asked_for(tmp_path):
    asked: dict[str, object] = {}

    class Forecaster:
        async def ask(self, function: str, arguments: dict[str, object]) -> dict[str, object]:
            asked.update(arguments)
            raise WorkerError("enough")

        def close(self) -> None:
            pass

    for name in ("autoencoder-3", "forecaster-2", "forecaster-4"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")

    async def body() -> None:
        async with open_panel(tmp_path, "Generative Forecast") as (user, panel):
            panel.forecaster = Forecaster()
            (choice,) = user.find(marker="forecast-checkpoint", kind=ui.select).elements
            assert choice.options == [NEWEST, "forecaster-4", "forecaster-2"]
            choice.value = "forecaster-2"
            user.find(marker="forecast").click()
            await settle(user, "forecast-error", "enough")

    asyncio.run(body())
    assert asked["checkpoint"] == "forecaster-2"


def test_each_layers_backend_is_listed_beside_the_run(tmp_path):
    from tiny_run import tiny_config

    config = tiny_config(tmp_path)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(asdict(config)))
    record = {"stage": "forecaster", "step": 1, "steps": 4, "losses": {"loss": 1.0}}
    layers = {"mid_block.attn1": "native", "mid_block.attn2": "sdpa"}
    (directory / "metrics.jsonl").write_text(json.dumps({**record, "layers": layers}) + "\n")

    async def body() -> None:
        async with open_panel(tmp_path, "LDM4TS Training") as (user, panel):
            panel.settings.run = "run"
            for _ in range(100):
                (table,) = user.find(marker="layers", kind=ui.table).elements
                if table.rows:
                    break
                await asyncio.sleep(0.05)
            assert table.rows == [
                {"layer": f"forecaster: {name}", "backend": server}
                for name, server in layers.items()
            ]

    asyncio.run(body())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamp": "when"}, "timestamp: no column 'when'; series.csv has"),
        ({"targets": ("d",)}, "targets: no column 'd'"),
        ({"history": 1}, "history: expected at least 2 rows"),
        ({"period": 99}, "period: expected 1 .. history=24"),
        ({"horizons": (500,)}, "series.csv: too short"),
    ],
)
def test_an_error_of_the_data_names_its_field_or_the_file(tmp_path, changes, message):
    from dataclasses import replace

    from tiny_run import tiny_config

    write_series(tmp_path)
    data = tiny_config(tmp_path).data
    assert "240 rows" in check_data(data).summary
    found = check_data(replace(data, **changes))
    assert found.summary == ""
    assert found.error.startswith(message)


def test_the_run_that_starts_is_the_one_that_is_set(tmp_path):
    from ldm4ts_kernels.runs import plan

    panel = new_panel(tmp_path)
    settings = panel.settings
    settings.attention, settings.batch_size, settings.image_size = "sage", 3, 96
    settings.horizons, settings.steps, settings.gradient_checkpointing = "1-3", 7, False
    config = plan({**settings.run_options(str(tmp_path / "x")), "device": "cpu"})
    assert (config.attention_backend, config.batch_size, config.steps) == ("sage", 3, 7)
    assert config.model_fields == {"image_size": [96, 96]}
    assert config.data.horizons == (1, 2, 3) and config.checkpointing == "none"
    assert asdict(config)["data"]["name"] == "sp500"
