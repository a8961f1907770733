"""The rows of the chains, and their adapters against wheels that record what they are given."""

import contextlib
import inspect
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ldm4ts_kernels import backends, requirements, wheels
from ldm4ts_kernels.backends import CHAINS, FLASH_ATTN4, NATIVE, Arguments
from ldm4ts_kernels.requirements import HALF, Requires
from tests.cases import CALL, Shape, draw

CPU = torch.device("cpu")


def arguments(**changes) -> Arguments:
    query, key, value = draw(Shape(1, 2, 2, 5, 7, 64), torch.float32, CPU)
    return Arguments(query, key, value, None, 0.0, False, None, False)._replace(**changes)


@pytest.mark.parametrize(
    ("requires", "change", "reason"),
    [
        (Requires(device="cuda"), {}, "needs a cuda device, got cpu"),
        (Requires(capability=(8, 0)), {}, "needs sm_80 or later, got sm_00"),
        (Requires(capabilities=frozenset({(8, 9)})), {}, "is built for sm_89 alone, got sm_00"),
        (Requires(dtypes=HALF), {"dtype": torch.float32}, "takes bfloat16, float16, got float32"),
        (Requires(head_dims=frozenset({64})), {"head_dim": 40}, "takes head dims [64], got 40"),
        (Requires(max_head_dim=256), {"value_dim": 512}, "takes head dims up to 256, got 512"),
        (Requires(unequal_head_dims=False), {"value_dim": 32}, "needs one head dim, got 64"),
        (Requires(any_stride=False), {"unit_stride": False}, "needs stride 1"),
        (Requires(masks=frozenset()), {"mask": "boolean"}, "takes no boolean mask"),
        (Requires(dropout=False), {"dropout": True}, "has no dropout"),
        (Requires(grad=False), {"needs_grad": True}, "has no backward pass"),
        (Requires(lse=False), {"return_lse": True}, "does not return the LSE"),
        (
            Requires(lse_grad=False),
            {"return_lse": True, "needs_grad": True},
            "an LSE that carries no gradient",
        ),
        (Requires(unequal_causal=False), {"is_causal": True}, "no top-left causal mask"),
        (Requires(extra=(backends._no_keys,)), {"key_length": 0}, "needs at least one key"),
        (Requires(extra=(backends._no_queries,)), {"batch": 0}, "needs at least one query"),
        (
            Requires(extra=(backends._native_gradient,)),
            {"head_dim": 320, "needs_grad": True},
            "has no backward pass past head dim 256, got 320",
        ),
        (Requires(extra=(backends._default_stream,)), {"default_stream": False}, "default stream"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_requirement_refuses_with_a_sentence_and_only_then(requires, change, reason):
    (found,) = requires.unmet(CALL._replace(**change))
    assert reason in found
    if change:
        assert requires.unmet(CALL) == []


@pytest.mark.parametrize(
    ("head_dim", "needs_grad", "refused"),
    [
        (256, True, []),
        (512, False, []),
        (264, True, ["has no backward pass past head dim 256, got 264"]),
        (513, False, ["takes head dims up to 512, got 513"]),
    ],
)
def test_native_serves_large_head_dims_without_a_gradient(
    monkeypatch, head_dim, needs_grad, refused
):
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    monkeypatch.setattr(requirements, "capability", lambda device: (9, 0))
    monkeypatch.setattr(backends.native, "device_error", lambda index: None)
    requires = replace(backends.NATIVE.requires, loads=None)
    call = CALL._replace(
        device=torch.device("cuda", 0),
        dtype=torch.float16,
        head_dim=head_dim,
        value_dim=head_dim,
        needs_grad=needs_grad,
    )
    assert requires.unmet(call) == refused


def test_every_chain_ends_in_sdpa_which_serves_every_plain_call():
    for chain in CHAINS.values():
        assert chain[-1].name == "sdpa"
        assert chain[-1].requires.unmet(CALL) == []
        assert len({row.name for row in chain}) == len(chain)


def test_wheels_without_a_backward_are_never_used_under_grad():
    for row in CHAINS["int8"]:
        if row.name.startswith("sage"):
            assert "has no backward pass" in row.requires.unmet(CALL._replace(needs_grad=True))


@pytest.fixture
def wheel(monkeypatch):
    """Install a fake module whose functions record how they are called."""
    calls = []

    def install(name: str, function: str, result) -> list:
        def record(*args, **kwargs):
            calls.append((args, kwargs))
            return result(*args)

        module = types.ModuleType(name)
        setattr(module, function, record)
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return install


def test_flash_attn_is_given_its_own_layout(wheel):
    def attend(query, key, value):  # (B, N, H, D), the wheel's
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)

    calls = wheel("flash_attn", "flash_attn_func", attend)
    given = arguments(scale=0.125)
    torch.testing.assert_close(wheels.flash_attn(given), F.scaled_dot_product_attention(*given[:3]))
    ((query, _, _), options) = calls[0]
    assert query.shape == (1, 5, 2, 64)
    assert options["softmax_scale"] == 0.125


def test_flash_attn_returns_the_lse_beside_the_output(wheel):
    wheel("flash_attn", "flash_attn_func", lambda q, k, v: (q, torch.zeros(1, 2, 5), None))
    out, lse = wheels.flash_attn(arguments(return_lse=True))
    assert out.shape == (1, 2, 5, 64)
    assert lse.shape == (1, 2, 5)


@pytest.fixture
def flash_attn4(monkeypatch):
    """Install a fake flash_attn.cute on a fake Hopper, and return how it is called."""
    calls = []

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, deterministic=False, return_lse=False
    ):
        calls.append((q.shape, softmax_scale, causal, deterministic))
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale)
        return out.transpose(1, 2), torch.zeros(out.shape[:3]) if return_lse else None

    for name in ("flash_attn", "flash_attn.cute"):
        module = types.ModuleType(name)
        module.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, name, module)
    for module in (backends, requirements):
        monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    monkeypatch.setattr(requirements, "import_error", lambda module: None)
    monkeypatch.setattr(backends, "_flash_attn4_keywords", flash_attn4_keywords)
    return calls


def flash_attn4_keywords():
    """Read the signature anew: the package itself reads it once a process."""
    return frozenset(inspect.signature(sys.modules["flash_attn.cute"].flash_attn_func).parameters)


@pytest.mark.parametrize("return_lse", [False, True])
def test_flash_attn4_is_given_its_own_layout_and_returns_ours(flash_attn4, return_lse):
    given = arguments(scale=0.25, return_lse=return_lse)
    result = wheels.flash_attn4(given)
    out = result[0] if return_lse else result
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*given[:3], scale=0.25))
    assert flash_attn4 == [((1, 5, 2, 64), 0.25, False, False)]
    if return_lse:
        assert result[1].shape == (1, 2, 5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"head_dim": 256, "value_dim": 256}, None),
        ({"device": CPU}, "needs a cuda device, got cpu"),
        ({"dtype": torch.float32}, "takes bfloat16, float16, got float32"),
        ({"head_dim": 44, "value_dim": 44}, "takes head dims up to 256 that 8 divides, got 44"),
        ({"head_dim": 512, "value_dim": 512}, "takes head dims up to 256 that 8 divides, got 512"),
        ({"value_dim": 32}, "needs one head dim, got 64 in query and 32 in value"),
        ({"mask": "boolean"}, "takes no boolean mask"),
        ({"dropout": True}, "has no dropout"),
        ({"is_causal": True}, "no top-left causal mask for unequal query and key lengths"),
        ({"is_causal": True, "key_length": 5}, None),
        ({"return_lse": True}, None),
        ({"return_lse": True, "needs_grad": True}, "returns an LSE that carries no gradient"),
        ({"unit_stride": False}, "needs stride 1"),
        ({"key_length": 0}, "needs at least one key"),
    ],
)
def test_flash_attn4_serves_by_name_what_it_can_and_auto_leaves_it_alone(
    flash_attn4, change, reason
):
    call = CALL._replace(device=torch.device("cuda", 0))._replace(**change)
    reasons = FLASH_ATTN4.requires.unmet(call)
    assert [reason in found for found in reasons] == ([] if reason is None else [True])
    assert "not yet measured" in FLASH_ATTN4.declines(call._replace(device=torch.device("cuda", 0)))


@pytest.mark.parametrize(
    ("capability", "head_dim", "reason"),
    [
        ((8, 0), 64, "is built for sm_90, sm_100, sm_103 alone, got sm_80"),
        ((12, 0), 64, "alone, got sm_120"),
        ((10, 0), 128, None),
        ((10, 0), 160, "takes head dims up to 128 that 8 divides, got 160"),
    ],
)
def test_flash_attn4_knows_its_gpus(flash_attn4, monkeypatch, capability, head_dim, reason):
    for module in (backends, requirements):
        monkeypatch.setattr(module, "capability", lambda device: capability)
    call = CALL._replace(device=torch.device("cuda", 0), head_dim=head_dim, value_dim=head_dim)
    reasons = FLASH_ATTN4.requires.unmet(call)
    assert [reason in found for found in reasons] == ([] if reason is None else [True])


def test_a_flash_attn4_of_another_interface_is_a_reason(flash_attn4, monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False): ...

    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_func", flash_attn_func)
    assert FLASH_ATTN4.requires.unmet(CALL._replace(device=torch.device("cuda", 0))) == [
        "needs a flash-attn-4 whose flash_attn_func knows deterministic, return_lse"
    ]


def test_sageattention_1_does_not_change_the_callers_key(wheel):
    def smooth_in_place(query, key, value):
        key -= key.mean(2, keepdim=True)  # what 1.0.6 does
        return query

    calls = wheel("sageattention", "sageattn", smooth_in_place)
    given = arguments()
    before = given.key.detach().clone()
    with torch.no_grad():
        wheels.sageattention(given)
    assert torch.equal(given.key, before)
    ((_, key, _), options) = calls[0]
    assert key.mean(2).abs().max() < 1e-6
    assert options == {
        "tensor_layout": "HND", "is_causal": False, "sm_scale": 0.125, "smooth_k": False
    }  # fmt: skip


def test_sageattention_2_is_given_only_keywords_of_its_signature(wheel):
    calls = wheel("sageattention", "sageattn", lambda query, key, value: query)
    with torch.no_grad():
        wheels.sageattention2(arguments(scale=0.5))
    assert set(calls[0][1]) == {"tensor_layout", "is_causal", "sm_scale", "return_lse"}
    assert calls[0][1]["sm_scale"] == 0.5


@pytest.mark.parametrize(
    ("module", "function", "adapter"),
    [
        ("sageattention", "sageattn", wheels.sageattention),
        ("sageattention", "sageattn", wheels.sageattention2),
        ("flash_attn.cute", "flash_attn_func", wheels.flash_attn4),
    ],
)
def test_a_wheel_that_launches_on_the_current_device_runs_on_that_of_its_tensors(
    wheel, monkeypatch, module, function, adapter
):
    events = []

    @contextlib.contextmanager
    def device(index):
        events.append(index)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 1)
    wheel(module, function, lambda query, key, value: events.append("runs") or (query, None))
    with torch.no_grad():
        adapter(arguments())
    assert events == [1, "runs", "left"]


LONG = {"key_length": 4096, "query_length": 4096, "head_dim": 64}


@pytest.mark.parametrize(
    ("name", "change", "declined"),
    [
        ("native", {}, False),
        ("native", {"key_length": 77, "query_length": 784}, False),
        ("native", {"needs_grad": True}, False),
        ("native", {"needs_grad": True, "query_length": 4096, "key_length": 77}, False),
        ("native", {"needs_grad": True, "head_dim": 160}, False),
        ("native", {"needs_grad": True, "head_dim": 160, "key_length": 100}, True),
        ("native", {"needs_grad": True, "head_dim": 160, "batch": 64}, True),
        ("native", {"needs_grad": True, "head_dim": 96}, True),
        ("native", {"needs_grad": True, "head_dim": 192}, True),
        ("native", {"needs_grad": True, "key_length": 256}, True),
        ("native", {"key_length": 256}, True),
        ("native", {"key_length": 784, "query_length": 784, "head_dim": 16}, False),
        ("native", {"query_length": 4096}, True),
        ("native", {"mask": "boolean"}, True),
        ("native", {"head_dim": 512}, True),
        ("triton", {}, True),
        ("triton", LONG, True),
        ("triton", {**LONG, "needs_grad": True, "head_dim": 160}, False),
        ("triton", {**LONG, "needs_grad": True, "head_dim": 128}, True),
        ("triton", {"key_length": 16384, "query_length": 16384, "head_dim": 64}, False),
        ("triton", {"key_length": 16384, "query_length": 16384, "needs_grad": True}, False),
        ("triton", {"key_length": 16384, "query_length": 16384, "mask": "boolean"}, True),
    ],
)
def test_auto_uses_a_kernel_on_hopper_only_where_it_was_measured_faster(
    monkeypatch, name, change, declined
):
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    (row,) = (row for row in CHAINS["exact"] if row.name == name)
    reason = row.declines(CALL._replace(device=torch.device("cuda", 0), **change))
    assert (reason is not None) == declined
    assert not declined or "measured" in reason


@pytest.mark.parametrize(
    ("found", "change", "declined"),
    [
        ((8, 9), {}, False),
        ((8, 6), LONG, False),
        ((8, 6), {**LONG, "needs_grad": True}, True),
        ((8, 0), {**LONG, "needs_grad": True}, False),
        ((8, 6), {**LONG, "needs_grad": True, "head_dim": 40}, False),
        ((8, 6), {**LONG, "needs_grad": True, "head_dim": 80}, False),
        ((8, 9), {"needs_grad": True, "key_length": 784}, False),
        ((8, 9), {**LONG, "head_dim": 128}, True),
        ((8, 9), {**LONG, "head_dim": 160}, False),
        ((8, 9), {**LONG, "head_dim": 160, "needs_grad": True}, True),
        ((8, 0), {"query_length": 49, "head_dim": 160}, True),
        ((8, 9), {"head_dim": 256}, True),
        ((8, 9), {"mask": "boolean"}, True),
        ((8, 9), {"dropout": True}, True),
    ],
)
def test_auto_uses_the_compiled_kernels_before_hopper_where_their_tiles_were_faster(
    monkeypatch, found, change, declined
):
    monkeypatch.setattr(backends, "capability", lambda device: found)
    reason = NATIVE.declines(CALL._replace(device=torch.device("cuda", 0), **change))
    assert (reason is not None) == declined
    assert not declined or "measured" in reason


def test_auto_uses_no_own_kernel_on_a_gpu_that_it_was_not_measured_on(monkeypatch):
    call = CALL._replace(device=torch.device("cuda", 0))
    for found, served in (((8, 6), {"native"}), ((12, 0), set())):
        monkeypatch.setattr(backends, "capability", lambda device, found=found: found)
        for row in (*CHAINS["exact"], *CHAINS["int8"]):
            if row.name in {"native", "triton", "native_int8", "triton_int8"} - served:
                assert "not yet measured" in row.declines(call)
