"""Models on disk: what comes back is what was saved, and what is not a checkpoint is said to be."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import batch_of, ready, seeded, untrained, windows, write_bert

from ldm4ts_kernels.model import LDM4TSModel


def test_a_saved_model_forecasts_the_same_when_loaded(tmp_path):
    model = ready(targets=(0, 2))
    model.save_pretrained(tmp_path)
    loaded = LDM4TSModel.from_pretrained(tmp_path, device="cpu")
    assert loaded.config == model.config
    assert not loaded.needs_autoencoder_training
    expected = model(windows(), num_samples=3, generator=seeded())
    actual = loaded(windows(), num_samples=3, generator=seeded())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_an_unfinished_stage_one_survives_saving(tmp_path):
    untrained().save_pretrained(tmp_path)
    assert LDM4TSModel.from_pretrained(tmp_path, device="cpu").needs_autoencoder_training


def test_a_checkpoint_holds_its_pretrained_autoencoder(tmp_path):
    ready().autoencoder.kl.save_pretrained(tmp_path / "original")
    model = untrained(autoencoder=str(tmp_path / "original"))
    assert not model.needs_autoencoder_training
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "original").rename(tmp_path / "gone")
    (tmp_path / "saved").rename(tmp_path / "moved")
    loaded = LDM4TSModel.from_pretrained(tmp_path / "moved", device="cpu")
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    assert not any(name.startswith("autoencoder.kl") for name in weights)
    expected = model.autoencoder.kl.state_dict()
    for name, tensor in loaded.autoencoder.kl.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_checkpoint_holds_its_text_encoder(tmp_path):
    (tmp_path / "bert").mkdir()
    model = ready(text_encoder=write_bert(tmp_path / "bert"))
    frozen = {id(parameter) for parameter in model.conditioner.text.encoder.parameters()}
    assert not frozen & {id(parameter) for parameter in model.trainable_parameters()}
    model.loss(batch_of())["loss"].backward()
    assert model.conditioner.text.projection.weight.grad.any()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "bert").rename(tmp_path / "gone")
    loaded = LDM4TSModel.from_pretrained(tmp_path / "saved", device="cpu")
    expected = model(windows(), generator=seeded())["mean"]
    assert torch.equal(loaded(windows(), generator=seeded())["mean"], expected)


def test_missing_foreign_and_damaged_checkpoints_are_errors(tmp_path):
    def load() -> LDM4TSModel:
        return LDM4TSModel.from_pretrained(tmp_path, device="cpu")

    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load()
    untrained().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, tensors = config.read_text(), load_file(weights)

    config.write_text(text.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ValueError, match=r"version 1, got \('ldm4ts', 99\)"):
        load()
    config.write_text(text[:20])
    with pytest.raises(ValueError, match="is not JSON"):
        load()
    config.write_text(text)

    save_file({name: t for name, t in tensors.items() if "head" not in name}, weights)
    with pytest.raises(ValueError, match=r"(?s)does not fit .*head\.project\.weight"):
        load()
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        load()
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load()
