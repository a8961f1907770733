from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from ldm4ts_kernels import accelerate_attention
from ldm4ts_kernels.checkpointing import attention_checkpoint_contexts, save_attention_outputs
from tests.families import FAMILIES, assert_same, build, kernels_run_here, run

BY_NAME = {family.name: family for family in FAMILIES}


class Calls(TorchDispatchMode):
    """Counts the attention forward operators that really run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        if "attention" in name or "flash" in name:
            self.counts["backward" if "backward" in name else "forward"] += 1
        return operator(*args, **(kwargs or {}))


def count(family, model):
    with Calls() as calls:
        result = run(family, model)
    return result, calls.counts["forward"], calls.counts["backward"]


@pytest.mark.parametrize(
    ("name", "checkpointed"),  # how many of the layers lie inside what diffusers checkpoints
    [("UNet2DConditionModel", 8), ("SD3Transformer2DModel", 3), ("WanTransformer3DModel", 4)],
)
def test_attention_is_computed_once_where_plain_checkpointing_computes_it_twice(name, checkpointed):
    family = BY_NAME[name]
    model = build(family)
    accelerate_attention(model)
    expected, forward, backward = count(family, model)
    assert forward == backward == family.layers
    model.enable_gradient_checkpointing()
    plain, twice, backward = count(family, model)
    assert (twice, backward) == (family.layers + checkpointed, family.layers)
    model.enable_gradient_checkpointing(save_attention_outputs)
    kept, once, backward = count(family, model)
    assert (once, backward) == (family.layers, family.layers)
    assert_same(plain, expected)
    assert_same(kept, expected)


@pytest.mark.skipif(not kernels_run_here(), reason="needs Triton's interpreter")
def test_our_own_operators_are_kept_too():
    family = BY_NAME["FluxTransformer2DModel"]
    model = build(family)
    accelerate_attention(model, backend="triton")
    expected, forward, _ = count(family, model)
    model.enable_gradient_checkpointing(save_attention_outputs)
    kept, once, backward = count(family, model)
    assert once == forward == backward == family.layers
    assert_same(kept, expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_a_transformers_encoder_takes_the_contexts():
    family = BY_NAME["ViTModel"]
    model = build(family)
    accelerate_attention(model)
    expected, forward, _ = count(family, model)
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": attention_checkpoint_contexts}
    )
    kept, once, _ = count(family, model)
    assert once == forward == family.layers
    assert_same(kept, expected)
