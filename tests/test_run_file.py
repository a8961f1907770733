"""A run's options from a file: types are checked, lists may be texts, errors name the key."""

import pytest

from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.run_file import read_run_file


@pytest.fixture
def read(tmp_path):
    """Write a text as run.yaml and read it."""

    def read_text(text: str) -> dict[str, object]:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return read_run_file(path)

    return read_text


def test_only_what_stands_there_is_given(read):
    assert read("steps: 3\noutput: null\n") == {"steps": 3}


def test_a_number_may_be_written_with_an_exponent_or_as_an_integer(read):
    assert read("learning_rate: 1e-3\nweight_decay: 0\n") == {
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    }


def test_lists_may_be_texts(read):
    data = read("data: {columns: 'a, b', targets: [b], horizons: 1-3}")["data"]
    assert data == {"columns": ("a", "b"), "targets": ("b",), "horizons": (1, 2, 3)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", "stepps: no such option; known are data, output"),
        ("data: {file: x}", "data.file: no such option; known are name, path"),
        ("steps: many", "steps: expected an integer, got 'many'"),
        ("steps: true", "steps: expected an integer, got True"),
        ("resume: 1", "resume: expected true or false, got 1"),
        ("learning_rate: fast", "learning_rate: expected a number, got 'fast'"),
        ("data: {horizons: [1, x]}", "data.horizons: expected a list, each an integer"),
        ("data: {horizons: 1 to 3}", "horizons: expected `1,5,20` or `1-96`, got '1 to 3'"),
        ("data: sp500", "data: expected names and values, got 'sp500'"),
        ("- steps", "expected names and values, got ['steps']"),
        ("a: [", "is not readable"),
    ],
)
def test_an_error_names_the_file_and_the_key(read, text, message):
    with pytest.raises(OptionError) as raised:
        read(text)
    assert message in str(raised.value)
