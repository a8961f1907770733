import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel

pytest.importorskip("triton", reason="needs triton")

from ldm4ts_kernels import sdpa_override
from ldm4ts_kernels.kernels import flash

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


@pytest.fixture
def launches(monkeypatch):
    """Activate the override for one test, and count the launches of the Triton kernels."""
    counts = {"forward": 0, "backward": 0}
    for name in counts:
        plain = getattr(flash, f"flash_{name}")

        def counted(*args, name=name, plain=plain):
            counts[name] += 1
            return plain(*args)

        monkeypatch.setattr(flash, f"flash_{name}", counted)
    sdpa_override.activate()
    yield counts
    sdpa_override.restore()


def attend(device, **options):
    """Return SDPA's output and gradients for one small call."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query, key, value = (
        torch.randn(2, 2, n, 16, dtype=dtype, device=device, generator=generator).requires_grad_()
        for n in (9, 7, 7)
    )
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(query, key, value, **options)
    return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_sdpa_runs_on_our_kernels_forward_and_backward(device, launches, options):
    ours = attend(device, **options)
    assert launches == {"forward": 1, "backward": 1} or device.type == "cuda"
    sdpa_override.restore()
    before = dict(launches)
    theirs = attend(device, **options)
    assert launches == before
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=1e-5 if device.type == "cpu" else 2e-2
        )


def test_what_ours_cannot_serve_goes_to_torchs_own_kernel(device, launches):
    mask = torch.ones(9, 7, dtype=torch.bool, device=device)
    plain, masked = attend(device), attend(device, attn_mask=mask)
    assert launches["forward"] <= 1
    for one, other in zip(masked, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-2)
    attend(device, dropout_p=0.5)


def test_it_holds_between_activate_and_restore_alone():
    assert current_flash_attention_impl() is None
    sdpa_override.activate()
    sdpa_override.activate()
    assert current_flash_attention_impl() == sdpa_override.NAME
    sdpa_override.restore()
    sdpa_override.restore()
    assert current_flash_attention_impl() is None


def test_an_old_torch_is_an_error_that_says_so(monkeypatch):
    monkeypatch.delattr("torch.nn.attention.register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"needs torch 2.11 or later"):
        sdpa_override.activate()
