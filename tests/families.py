"""The model families that `accelerate_attention` plugs: one tiny model of each, and a call of it.

tests/test_families.py runs each through what training and deployment do with a model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor, nn

from ldm4ts_kernels.requirements import import_error


@dataclass(frozen=True)
class Family:
    """A tiny model with random weights, and how to run it; `call` returns its main output.

    `without` names what the model cannot do by itself either.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    layers: int
    without: tuple[str, ...] = ()


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def call_unet(model: nn.Module) -> Tensor:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    sample, context = random(2, 4, 8, 8), random(2, 5, 16)
    return model(sample, 3, context, encoder_attention_mask=mask).sample


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(16,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=8,
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def call_sd3(model: nn.Module) -> Tensor:
    return model(random(2, 4, 8, 8), random(2, 5, 16), random(2, 16), torch.tensor([1, 2])).sample


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def call_flux(model: nn.Module) -> Tensor:
    return model(
        hidden_states=random(2, 16, 4),
        encoder_hidden_states=random(2, 6, 16),
        pooled_projections=random(2, 16),
        timestep=torch.tensor([0.1, 0.2]),
        img_ids=random(16, 3),
        txt_ids=random(6, 3),
        return_dict=False,
    )[0]


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )


def call_wan(model: nn.Module) -> Tensor:
    text = random(1, 6, 16)
    return model(random(1, 4, 2, 4, 4), torch.tensor([3]), text, return_dict=False)[0]


def qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def call_qwen(model: nn.Module) -> Tensor:
    return model(
        hidden_states=random(1, 16, 16),
        encoder_hidden_states=random(1, 5, 16),
        encoder_hidden_states_mask=torch.tensor([[1, 1, 1, 1, 0]]),
        timestep=torch.tensor([0.1]),
        img_shapes=[[(1, 4, 4)]],
    ).sample


def clip() -> nn.Module:
    import transformers

    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=50,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=2,
        )
    )


def call_clip(model: nn.Module) -> Tensor:
    tokens = torch.arange(14).reshape(2, 7)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return model(tokens, attention_mask=mask).last_hidden_state[:, :4]


def t5() -> nn.Module:
    import transformers

    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=50, dropout_rate=0.0
        )
    )


def call_t5(model: nn.Module) -> Tensor:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return model(torch.arange(14).reshape(2, 7), attention_mask=mask).last_hidden_state[:, :4]


def vit() -> nn.Module:
    import transformers

    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=2,
        )
    )


FAMILIES = (
    Family("UNet2DConditionModel", unet, call_unet, 8),
    Family(
        "AutoencoderKL",
        autoencoder,
        lambda model: model(random(1, 3, 4, 4)).sample,
        2,
        without=("compile",),  # torch's group norm on the CPU wants another layout than it gets
    ),
    Family("SD3Transformer2DModel", sd3, call_sd3, 3),
    Family("FluxTransformer2DModel", flux, call_flux, 2),
    Family("WanTransformer3DModel", wan, call_wan, 4),
    Family("QwenImageTransformer2DModel", qwen, call_qwen, 2),
    Family("CLIPTextModel", clip, call_clip, 2),
    Family("T5EncoderModel", t5, call_t5, 2),
    Family("ViTModel", vit, lambda model: model(random(1, 3, 8, 8)).last_hidden_state, 2),
)


def kernels_run_here() -> bool:
    """Return whether the Triton kernels serve tensors on the CPU, where these models live."""
    if import_error("triton") is not None:
        return False
    from ldm4ts_kernels.kernels.flash import INTERPRET

    return INTERPRET


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def build(family: Family) -> nn.Module:
    """Return the family's model with the same random weights every time."""
    torch.manual_seed(0)
    return family.build().train()


def run(family: Family, model: nn.Module) -> list[Tensor]:
    """Return the output, and the gradient of every parameter, 0 for one that is not used."""
    model.zero_grad()
    out = family.call(model)
    out.square().mean().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [out, *grads]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
