"""What the frozen parts make of a window is computed once, and is what a step would compute."""

import torch
from tiny_model import batch_of, ready, seeded, windows, write_bert

from ldm4ts_kernels.batches import ENCODED_AT_ONCE, EncodedWindows
from ldm4ts_kernels.model.placement import kept_on_host


class Counting(list):
    """Windows whose history is their index."""

    def __init__(self, count: int) -> None:
        super().__init__({"history": torch.full((2, 1), float(index))} for index in range(count))
        self.encoded: list[list[float]] = []

    def encode(self, history: torch.Tensor) -> dict[str, torch.Tensor]:
        self.encoded.append(history[:, 0, 0].tolist())
        return {"latents": history + 0.5}


def test_windows_that_are_wanted_are_encoded_once_in_whole_blocks():
    source = Counting(2 * ENCODED_AT_ONCE + 3)
    wanted = [2 * ENCODED_AT_ONCE + 1, 0, 5, 5]
    encoded = EncodedWindows(source, source.encode, wanted)
    blocks = [list(range(ENCODED_AT_ONCE)), list(range(2 * ENCODED_AT_ONCE, len(source)))]
    assert source.encoded == blocks
    for index in wanted:
        window = encoded[index]
        assert torch.equal(window["history"] + 0.5, window["latents"])
    assert len(source.encoded) == 2
    assert len(encoded) == len(source)


def test_a_loss_of_encoded_windows_is_that_of_the_windows():
    model = ready()
    plain = model.loss(batch_of(), seeded())
    encoded = model.loss({**batch_of(), **model.encode_frozen(windows())}, seeded())
    torch.testing.assert_close(encoded, plain, rtol=1e-5, atol=1e-5)


def test_a_text_encoder_reads_a_window_once(tmp_path):
    model = ready(text_encoder=write_bert(tmp_path))
    plain = model.loss(batch_of(), seeded())
    frozen = model.encode_frozen(windows())
    calls = []
    model.conditioner.text.encoder.register_forward_hook(lambda *_: calls.append(1))
    encoded = model.loss({**batch_of(), **frozen}, seeded())
    assert not calls
    torch.testing.assert_close(encoded, plain, rtol=1e-5, atol=1e-5)


def test_the_encoders_come_back_and_forecasts_do_not_need_them():
    model = ready()
    device = next(model.autoencoder.kl.encoder.parameters()).device
    with kept_on_host(model, "forecaster"):
        assert model.sample(windows(1), 1, 1).isfinite().all()
    assert next(model.autoencoder.kl.encoder.parameters()).device == device
