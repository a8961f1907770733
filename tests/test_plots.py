"""A fan chart is a picture with a panel a target, or an error that names what does not fit."""

import numpy as np
import pytest

from ldm4ts_kernels.plots import save_fan_chart

plt = pytest.importorskip("matplotlib.image")
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def chart(path, names=("close",), horizons=(1, 5, 20), **changes):
    count = len(names)
    spread = np.linspace(-1, 1, len(LEVELS))[:, None, None]
    arguments = {
        "history": np.zeros((30, count)),
        "quantiles": spread * np.ones((1, len(horizons), count)),
        "actual": np.ones((len(horizons), count)),
        **changes,
    }
    save_fan_chart(path, horizons=horizons, levels=LEVELS, names=names, title="series", **arguments)


def ink(path, rgb: tuple[float, float, float]) -> int:
    """Count the pixels close to a colour."""
    picture = plt.imread(path)[..., :3]
    return int((np.abs(picture - np.array(rgb)).max(axis=-1) < 0.1).sum())


def test_a_chart_shows_history_fan_and_what_came(tmp_path):
    chart(tmp_path / "a.png")
    chart(tmp_path / "b.png", actual=None)
    orange, pale_blue = (1.0, 0.5, 0.05), (0.82, 0.89, 0.94)
    assert ink(tmp_path / "a.png", orange) > 50 > ink(tmp_path / "b.png", orange)
    assert ink(tmp_path / "a.png", pale_blue) > 500


def test_more_targets_make_a_taller_picture(tmp_path):
    chart(tmp_path / "one.png")
    chart(tmp_path / "seven.png", names=tuple("abcdefg"), horizons=tuple(range(1, 25)))
    heights = [plt.imread(tmp_path / name).shape[0] for name in ("one.png", "seven.png")]
    assert heights[1] > 2 * heights[0]


@pytest.mark.parametrize(
    "changes", [{"quantiles": np.zeros((5, 2, 1))}, {"history": np.zeros((30, 2))}]
)
def test_shapes_that_do_not_fit_are_an_error(tmp_path, changes):
    with pytest.raises(ValueError, match=r"quantiles: expected \(5, 3, 1\)"):
        chart(tmp_path / "a.png", **changes)


def test_an_unknown_format_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        chart(tmp_path / "a.xyz")
