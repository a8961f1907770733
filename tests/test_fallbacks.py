"""Each way in which a link of the chain may not serve, as `report()` and `explain` show it."""

import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from ldm4ts_kernels import accelerate_attention, backends, native, requirements
from ldm4ts_kernels.attention import explain_call
from ldm4ts_kernels.backends import CHAINS, NATIVE
from tests import cases
from tests.families import FAMILIES, build

LONG = {"batch": 2, "heads": 8, "kv_heads": 8, "query_length": 4096, "key_length": 4096}
CALL = cases.CALL._replace(device=torch.device("cuda", 0), **LONG)
PRECISION = {row.name: name for name, chain in CHAINS.items() for row in chain}
WHEELS = {
    "flash_attn": "flash_attn",
    "flash_attn4": "flash_attn.cute",
    "sageattention2": "sageattention",
    "sageattention": "sageattention",
    "triton": "triton",
    "triton_int8": "triton",
}
BREAKAGES = {  # what a wheel's inner module does, and what the user must read
    "raise ImportError('libcudart.so.11.0: cannot open shared object file')": "libcudart.so.11.0",
    "raise OSError('invalid ELF header')": "invalid ELF header",
    "raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEi')": "undefined symbol: _ZN3c10",
    "raise ImportError('built for torch 2.6')": "built for torch 2.6",
    "import types; types.a_thing_of_another_version": "module 'types' has no",
    "import a_module_that_nobody_has": "No module named 'a_module_that_nobody_has'",
}
CALLS = [
    ("native", {"device": torch.device("cpu")}, "needs a cuda device, got cpu"),
    ("native", {"dtype": torch.float32}, "takes bfloat16, float16, got float32"),
    ("native", {"head_dim": 520, "value_dim": 520}, "takes head dims up to 512, got 520"),
    ("native", {"mask": "additive with gradient"}, "takes no additive with gradient mask"),
    ("flash_attn", {"dtype": torch.float32}, "takes bfloat16, float16, got float32"),
    ("flash_attn", {"head_dim": 512, "value_dim": 512}, "takes head dims up to 256, got 512"),
    ("flash_attn", {"mask": "boolean"}, "takes no boolean mask"),
    ("flash_attn", {"return_lse": True, "needs_grad": True}, "an LSE that carries no gradient"),
    ("triton", {"dtype": torch.float64}, "takes bfloat16, float16, float32, got float64"),
    ("triton", {"head_dim": 520, "value_dim": 520}, "takes head dims up to 512 in"),
    ("flash_attn4", {"dtype": torch.float32}, "takes bfloat16, float16, got float32"),
    ("flash_attn4", {"mask": "boolean"}, "takes no boolean mask"),
    ("flash_attn4", {"dropout": True}, "has no dropout"),
    ("sageattention2", {"dtype": torch.float32}, "takes bfloat16, float16, got float32"),
    ("sageattention2", {"head_dim": 160, "value_dim": 160}, "takes head dims up to 128, got 160"),
    ("sageattention2", {"mask": "additive"}, "takes no additive mask"),
    ("sageattention2", {"needs_grad": True}, "has no backward pass"),
    ("sageattention", {"head_dim": 40, "value_dim": 40}, "takes head dims [64, 96, 128], got 40"),
    ("sageattention", {"mask": "boolean"}, "takes no boolean mask"),
    ("sageattention", {"needs_grad": True}, "has no backward pass"),
    ("triton_int8", {"dtype": torch.float32}, "takes bfloat16, float16, got float32"),
    ("triton_int8", {"head_dim": 512, "value_dim": 512}, "takes head dims up to 256, got 512"),
    ("triton_int8", {"mask": "additive with gradient"}, "takes no additive with gradient mask"),
    *(
        (backend, {"transformed": True}, "knows neither torch.func nor forward-mode AD")
        for backend in ("native", "flash_attn", "triton", "sageattention", "triton_int8")
    ),
]


@pytest.fixture
def on_hopper(monkeypatch):
    """Pretend that cuda:0 is a Hopper, and look for wheels anew at every question."""
    set_capability(monkeypatch, (9, 0))
    # The compiled kernels, where they are built, would serve before most of the others.
    monkeypatch.setattr(backends.native, "device_error", lambda index: "is left out")
    for name in ("import_error", "version"):
        monkeypatch.setattr(requirements, name, getattr(requirements, name).__wrapped__)
    yield
    sys.modules.pop("flash_attn", None)  # the folder around a broken flash_attn.cute


def set_capability(monkeypatch, found):
    for module in (requirements, backends):
        monkeypatch.setattr(
            module, "capability", lambda device: found if device.type == "cuda" else (0, 0)
        )


def assert_shown(backend: str, reason: str, **changes) -> None:
    """Require the reason of `explain`, and of the report of a model whose last call was like it."""
    call, precision = CALL._replace(**changes), PRECISION[backend]
    explanation = explain_call(call, precision=precision)
    assert any(reason in found for found in explanation.reasons[backend]), explanation
    family = next(family for family in FAMILIES if family.name == "ViTModel")
    with accelerate_attention(build(family), precision=precision) as handle:
        for layer in handle.layers:
            layer.call, layer.shape = call, (2, 8, 4096, 4096, call.head_dim)
        report = handle.report()
    assert {row.served_by for row in report} == {explanation.chosen} != {backend}
    assert any(reason in found for row in report for found in row.reasons[backend])
    assert reason in str(report)


@pytest.mark.parametrize(
    ("backend", "change", "reason"), CALLS, ids=lambda value: str(value).replace("\n", " ")
)
def test_a_call_that_a_link_does_not_take(on_hopper, backend, change, reason):
    assert_shown(backend, reason, **change)


@pytest.mark.parametrize(
    ("backend", "capability", "reason"),
    [
        ("native", (7, 5), "needs sm_80 or later, got sm_75"),
        ("flash_attn", (7, 5), "needs sm_80 or later, got sm_75"),
        ("flash_attn4", (8, 9), "is built for sm_90, sm_100, sm_103 alone, got sm_89"),
        ("sageattention2", (7, 5), "is built for sm_80, sm_86, sm_89, sm_90"),
        ("sageattention", (7, 5), "needs sm_80 or later, got sm_75"),
    ],
)
def test_a_gpu_that_a_link_is_not_built_for(on_hopper, monkeypatch, backend, capability, reason):
    set_capability(monkeypatch, capability)
    assert_shown(backend, reason)


@pytest.mark.parametrize("backend", WHEELS)
def test_a_wheel_that_is_missing(on_hopper, monkeypatch, backend):
    module = WHEELS[backend]
    monkeypatch.setitem(sys.modules, module, None)
    assert_shown(backend, f"{module} does not import: import of {module} halted")


@pytest.mark.parametrize("statement", BREAKAGES)
@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn4", "sageattention2", "triton"])
def test_a_wheel_that_is_broken(on_hopper, monkeypatch, tmp_path, backend, statement):
    module = WHEELS[backend]
    folder = tmp_path.joinpath(*module.split("."))
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f"{statement}\n")
    for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert_shown(backend, f"{module} does not import: {BREAKAGES[statement]}")


@pytest.mark.parametrize(
    ("backend", "found", "reason"),
    [
        ("flash_attn", "1.0.9", "needs flash_attn 2.x, found 1.0.9"),
        ("sageattention2", "1.0.6", "needs sageattention 2.x, found 1.0.6"),
        ("sageattention", "2.2.0", "needs sageattention 1.x, found 2.2.0"),
    ],
)
def test_a_wheel_of_another_version(on_hopper, monkeypatch, backend, found, reason):
    looked_for = WHEELS[backend]
    monkeypatch.setattr(
        requirements, "import_error", lambda module: None if module == looked_for else "is missing"
    )
    monkeypatch.setattr(requirements, "version", lambda module: found)
    # The other line of the same wheel would serve: a gradient keeps it off.
    assert_shown(backend, reason, needs_grad=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the compiled extension is not part of this install"),
        (b"not a library", "the compiled extension does not load: "),
    ],
)
def test_a_compiled_extension_that_is_missing_or_broken(
    on_hopper, monkeypatch, tmp_path, content, reason
):
    library = tmp_path / "_C.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(native, "LIBRARY", library)
    row = replace(NATIVE, requires=replace(NATIVE.requires, loads=native._load))
    monkeypatch.setitem(CHAINS, "exact", (row, *CHAINS["exact"][1:]))
    assert_shown("native", reason)
