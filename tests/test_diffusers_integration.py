import copy

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

from ldm4ts_kernels import patch_unet_attention
from ldm4ts_kernels.diffusers_integration import ATTENTION_BACKENDS, AttentionProcessor, served_by


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )


def run(unet, mask=None):
    """Return the output and all gradients of one pass."""
    torch.manual_seed(1)
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    out = unet(sample, 3, context, encoder_attention_mask=mask).sample
    return [out, *torch.autograd.grad(out.square().sum(), list(unet.parameters()))]


@pytest.mark.filterwarnings("ignore:precision='int8'")
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_patched_unet_computes_what_it_computed_forward_and_backward(unet, backend, masked):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if masked else None
    expected = run(unet, mask)
    assert patch_unet_attention(unet, backend) is unet
    assert unet.is_gradient_checkpointing
    for ours, theirs in zip(run(unet, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_patched_autoencoder_computes_what_it_computed(autoencoder):
    image = torch.randn(1, 3, 16, 16)
    expected = autoencoder(image).sample
    patch_unet_attention(autoencoder)
    torch.testing.assert_close(autoencoder(image).sample, expected)


def test_it_says_which_backend_served_each_layer(unet):
    patch_unet_attention(unet, enable_gradient_checkpointing=False)
    assert not unet.is_gradient_checkpointing
    assert set(served_by(unet).values()) == {None}
    run(unet)
    assert len(served_by(unet)) == len(unet.attn_processors)
    assert set(served_by(unet).values()) == {"sdpa"}
    patch_unet_attention(unet, "default")
    run(unet)
    assert set(served_by(unet).values()) == {"materialised"}


def test_a_patched_unet_compiles_as_one_graph(unet):
    patch_unet_attention(unet, enable_gradient_checkpointing=False)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled), run(unet), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_patched_unet_can_be_copied_and_saved(unet, tmp_path):
    patch_unet_attention(unet)
    twin = copy.deepcopy(unet)
    assert isinstance(next(iter(twin.attn_processors.values())), AttentionProcessor)
    unet.save_pretrained(tmp_path)
    restored = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(restored)[0], run(unet)[0])


def test_an_unknown_backend_is_refused(unet):
    with pytest.raises(ValueError, match=r"backend must be one of \['default', 'flash'"):
        patch_unet_attention(unet, "xformers")


def test_a_module_without_attention_is_refused():
    with pytest.raises(ValueError, match="no diffusers Attention layers"):
        patch_unet_attention(torch.nn.Linear(2, 2))


def test_layers_of_another_kind_are_refused_and_nothing_is_changed(unet):
    layer = next(m for m in unet.modules() if type(m).__name__ == "Attention")
    layer.added_kv_proj_dim = 8
    before = dict(unet.attn_processors)
    with pytest.raises(NotImplementedError, match="projects added keys"):
        patch_unet_attention(unet)
    assert unet.attn_processors == before
    assert not unet.is_gradient_checkpointing
