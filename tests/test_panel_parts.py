"""Parts of the panel without a page: charts, uploads, the child process that computes."""

import asyncio
from dataclasses import replace

import pytest

pytest.importorskip("nicegui")

from nicegui.elements.upload_files import SmallFileUpload

from ldm4ts_kernels.panel.charts import fan_chart, loss_chart
from ldm4ts_kernels.panel.shown_forecast import ShownForecast
from ldm4ts_kernels.panel.uploads import keep_upload
from ldm4ts_kernels.panel.worker import Worker, WorkerError

FORECAST = ShownForecast(
    title="series",
    names=["a", "b"],
    horizons=[1, 5],
    levels=[0.05, 0.25, 0.5, 0.75, 0.95],
    history=[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]],
    quantiles=[[[level + 3, 31.0 + level], [level + 4, 32.0]] for level in range(5)],
    actual=None,
    columns=[],
    rows=[],
    csv="",
    views=[],
)


def test_the_bands_of_the_fan_end_at_the_quantiles():
    series = fan_chart(FORECAST, 0)["series"]
    by_name = {entry["name"]: entry["data"] for entry in series if entry["name"]}
    floors = [entry["data"] for entry in series if not entry["name"]]
    assert by_name["history"] == [[-2, 1.0], [-1, 2.0], [0, 3.0]]
    assert by_name["median"] == [[0, 3.0], [1, 5.0], [5, 6.0]]
    assert floors[0] == [[0, 3.0], [1, 3.0], [5, 4.0]]
    assert by_name["90%"] == [[0, 0.0], [1, 4.0], [5, 4.0]]
    assert by_name["50%"] == [[0, 0.0], [1, 2.0], [5, 2.0]]


def test_what_came_is_drawn_where_it_is_known():
    known = replace(FORECAST, actual=[[3.5, 0.0], [4.5, 0.0]])
    names = [entry["name"] for entry in fan_chart(known, 0)["series"]]
    assert "actual" in names and "actual" not in [
        e["name"] for e in fan_chart(FORECAST, 1)["series"]
    ]


def test_a_stage_without_steps_has_no_curve():
    assert [entry["name"] for entry in loss_chart([(1, 0.5)], [])["series"]] == ["autoencoder"]


def test_an_upload_cannot_leave_its_directory_or_replace_another(tmp_path):
    async def body() -> None:
        first = await keep_upload(SmallFileUpload("../../x.csv", "text/csv", b"a"), tmp_path)
        second = await keep_upload(SmallFileUpload("../../x.csv", "text/csv", b"b"), tmp_path)
        again = await keep_upload(SmallFileUpload("../../x.csv", "text/csv", b"a"), tmp_path)
        assert first == again != second
        place = (tmp_path / ".panel" / "data").resolve()
        assert sorted(map(str, place.iterdir())) == sorted([first, second])

    asyncio.run(body())


async def end(worker: Worker) -> None:
    child = worker.process
    worker.close()
    assert worker.process is None
    await child.wait()


def test_the_child_process_reports_errors_and_is_started_again():
    async def body() -> None:
        worker = Worker()
        with pytest.raises(WorkerError, match="precision must be one of"):
            await worker.ask("estimate", {"precision": "fp8"})
        child = worker.process
        child.kill()
        await child.wait()
        with pytest.raises(WorkerError, match="must be one of"):
            await worker.ask("estimate", {"preset": "none"})
        assert worker.process.pid != child.pid
        await end(worker)

    asyncio.run(body())


def test_a_child_that_ends_over_a_question_is_an_error():
    async def body() -> None:
        worker = Worker()
        with pytest.raises(WorkerError, match="the process that computes ended"):
            await worker.ask("no such function", {})
        await end(worker)

    asyncio.run(body())
