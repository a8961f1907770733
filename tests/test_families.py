"""The table of docs/integrations.md: model family × what is done with the plugged model."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from ldm4ts_kernels import accelerate_attention, save_attention_outputs
from ldm4ts_kernels.checkpointing import attention_checkpoint_contexts
from tests import test_context_parallel
from tests.families import FAMILIES, assert_same, build, kernels_run_here, run

DOCUMENT = Path(__file__).parents[1] / "docs" / "integrations.md"


def plugged(family, **options):
    model = build(family)
    return model, accelerate_attention(model, **options)


def forward_and_backward(family, tmp_path):
    """Through the interpreted Triton kernels, against the model as it was."""
    backend = "triton" if kernels_run_here() else "sdpa"
    model, handle = plugged(family, backend=backend)
    assert_same(run(family, model), run(family, build(family)))
    assert len(handle.layers) == family.layers
    assert {layer.served_by for layer in handle.layers} == {backend}


def checkpointing(family, tmp_path):
    """Plain, reentrant and selective; under all three, gradients stay what they were."""
    expected = run(family, build(family))
    for reentrant in (False, True, None):
        model, _ = plugged(family)
        if hasattr(model, "gradient_checkpointing_enable"):  # a transformers model
            contexts = {"context_fn": attention_checkpoint_contexts} if reentrant is None else {}
            model.gradient_checkpointing_enable({"use_reentrant": bool(reentrant), **contexts})
        elif reentrant is None:
            model.enable_gradient_checkpointing(save_attention_outputs)
        else:
            model.enable_gradient_checkpointing(
                lambda block, *args, reentrant=reentrant: checkpoint(
                    block, *args, use_reentrant=reentrant
                )
            )
        assert_same(run(family, model), expected)


def compile_(family, tmp_path):
    """One graph without a break, forward and backward."""
    model, _ = plugged(family)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(run(family, compiled), run(family, build(family)))


def autocast(family, tmp_path):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run(family, build(family))
        model, handle = plugged(family)
        result = run(family, model)
    assert {layer.call.dtype for layer in handle.layers} == {torch.bfloat16}
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.01)


def channels_last(family, tmp_path):
    expected = run(family, build(family))
    model, _ = plugged(family)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    assert_same(run(family, model), expected)


def deepcopy(family, tmp_path):
    model, handle = plugged(family)
    expected = run(family, model)
    twin = copy.deepcopy(model)
    assert_same(run(family, twin), expected)
    handle.verify()


def save_pretrained(family, tmp_path):
    model, _ = plugged(family)
    model.save_pretrained(tmp_path)
    assert not any("ldm4ts" in file.read_text() for file in tmp_path.glob("*.json"))
    restored = type(model).from_pretrained(tmp_path).train()
    assert_same(run(family, restored), run(family, model))


CAPABILITIES = {
    "forward, backward": forward_and_backward,
    "checkpointing": checkpointing,
    "compile": compile_,
    "autocast": autocast,
    "channels_last": channels_last,
    "deepcopy": deepcopy,
    "save_pretrained": save_pretrained,
}
CELLS = [
    pytest.param(family, check, id=f"{family.name}: {name}")
    for family in FAMILIES
    for name, check in CAPABILITIES.items()
    if name not in family.without
]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(("family", "check"), CELLS)
def test_a_plugged_model_does_what_it_did(family, check, tmp_path):
    check(family, tmp_path)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_plugged_model_has_the_forward_mode_derivatives_that_it_had(family):
    """As MeanFlow and consistency training take them: SDPA serves, whatever `auto` would take."""

    class Loss(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self):
            return family.call(self.model).square().mean()

    results = []
    for plug in (False, True):
        module = Loss(build(family))
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        tangents = {name: torch.full_like(p, 0.1) for name, p in parameters.items()}
        handle = accelerate_attention(module) if plug else None

        def loss(given, module=module):
            return torch.func.functional_call(module, given, ())

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            results.append(torch.func.jvp(loss, (parameters,), (tangents,)))
    torch.testing.assert_close(*results)
    assert results[0][1] != 0
    assert {row.served_by for row in handle.report()} == {"sdpa"}


def test_the_document_shows_what_is_tested_here():
    lines = re.findall(r"^\| (.+) \|$", DOCUMENT.read_text(), flags=re.MULTILINE)
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in lines]
    header = next(row for row in rows if row[0] == "model")
    assert header[1:] == [*CAPABILITIES, "context parallel"]
    cells = {row[0]: row[1:] for row in rows if len(row) == len(header)}
    for family in FAMILIES:
        expected = ["no" if name in family.without else "yes" for name in CAPABILITIES]
        shared = "yes" if family.name in test_context_parallel.FAMILIES else "no"
        assert cells[family.name] == [*expected, shared], family.name
