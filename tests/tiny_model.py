"""An LDM4TS model that trains in milliseconds, and data for it."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from ldm4ts_kernels.model import LDM4TSModel

TINY = {
    "history": 24,
    "variates": 3,
    "targets": (2,),
    "period": 6,
    "image_size": (32, 32),
    "horizons": (1, 4),
    "diffusion_steps": 20,
    "sampling_steps": 3,
    "unet_channels": (16, 32),
    "unet_layers_per_block": 1,
    "unet_heads": 2,
    "cross_attention_dim": 32,
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "d_ff": 32,
    "dropout": 0.0,
    "patch_length": 8,
    "patch_stride": 4,
    "fusion_width": 16,
    "autoencoder_channels": (8, 8, 16, 16),
}


def windows(batch: int = 3, variates: int = 3) -> torch.Tensor:  # (B, L, V)
    generator = torch.Generator().manual_seed(0)
    return 100 + torch.randn(batch, 24, variates, generator=generator).cumsum(dim=1)


def futures(batch: int = 3, horizons: int = 2, targets: int = 1) -> torch.Tensor:  # (B, T, C)
    return 100 + torch.randn(batch, horizons, targets, generator=torch.Generator().manual_seed(1))


def batch_of(batch: int = 3) -> dict[str, torch.Tensor]:
    return {"history": windows(batch), "future": futures(batch)}


def untrained(device: str = "cpu", **fields: object) -> LDM4TSModel:
    torch.manual_seed(0)
    return LDM4TSModel(device=device, **{**TINY, **fields})


def ready(**fields: object) -> LDM4TSModel:
    """Return a model past stage 1 whose zero-initialised layers are no longer zero.

    The head starts at zero, which stops every gradient behind it in the first step.
    """
    model = untrained(**fields)
    model.freeze_autoencoder(windows())
    torch.nn.init.normal_(model.head.project.weight, std=0.5)
    return model


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def write_bert(path: Path) -> str:
    """Write a BERT with random weights and a tokenizer of single characters; return its path."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    vocabulary = path / "vocab.txt"
    vocabulary.write_text("\n".join(pieces + [f"##{c}" for c in characters]) + "\n")
    BertTokenizer(str(vocabulary)).save_pretrained(path)
    config = BertConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(path)
    return str(path)
