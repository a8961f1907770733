import logging
import re

import pytest
import torch
import torch.nn.functional as F

from ldm4ts_kernels import attention, attention_fn, explain
from ldm4ts_kernels.attention import explain_call
from tests.cases import Shape, draw

CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 4, 5, 7, 16)


def tensors(shape: Shape = SHAPE, dtype: torch.dtype = torch.float32):
    return draw(shape, dtype, CPU)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.2},
        {"is_causal": True},
        {"attn_mask": torch.arange(7)[None] < 4},
        {"attn_mask": torch.linspace(-1, 1, 35).reshape(1, 1, 5, 7)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_it_is_a_drop_in_for_sdpa(options):
    leaves = tensors()
    ours, theirs = (
        attention_fn(*leaves, **options),
        F.scaled_dot_product_attention(*leaves, **options),
    )
    torch.testing.assert_close(ours, theirs)
    dout = torch.randn_like(ours)
    for own, other in zip(
        torch.autograd.grad(ours, leaves, dout),
        torch.autograd.grad(theirs, leaves, dout),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_positional_arguments_have_the_order_of_sdpa():
    query, key, value = tensors(SHAPE._replace(G=2))
    mask = torch.ones(5, 7, dtype=torch.bool)
    ours = attention_fn(query, key, value, mask, 0.0, False, 0.3, True)
    theirs = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.3,
                                            enable_gqa=True)  # fmt: skip
    torch.testing.assert_close(ours, theirs)


def test_3d_input_is_taken_as_one_head():
    query, key, value = (tensor[:, 0] for tensor in tensors())
    mask = torch.randn(2, 5, 7)
    for options in ({}, {"attn_mask": mask}, {"attn_mask": mask[0]}):
        ours = attention_fn(query, key, value, **options)
        theirs = F.scaled_dot_product_attention(query, key, value, **options)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_key_is_exact_forward_and_backward(groups):
    leaves = tensors(Shape(2, 4, groups, 5, 1, 16))
    ours = attention_fn(*leaves, enable_gqa=True)
    theirs = F.scaled_dot_product_attention(*leaves, enable_gqa=True)
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous()
    dout = torch.randn_like(ours)
    own = torch.autograd.grad(ours, leaves, dout)
    other = torch.autograd.grad(theirs, leaves, dout)
    assert (own[0] == 0).all()
    assert (own[1] == 0).all()
    torch.testing.assert_close(own[2], other[2])
    assert "one key" in str(explain(*leaves, enable_gqa=True))


def test_one_key_behind_a_mask_takes_the_chain():
    query, key, value = tensors(SHAPE._replace(K=1))
    mask = torch.zeros(5, 1, dtype=torch.bool)
    assert (attention_fn(query, key, value, mask) == 0).all()
    assert explain(query, key, value, mask).chosen == "sdpa"


def test_autocast_casts_as_it_casts_sdpa():
    query, key, value = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention_fn(query, key, value)
        theirs = F.scaled_dot_product_attention(query, key, value)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("keys", [7, 1])
def test_it_compiles_as_one_graph_without_a_warning(keys):
    leaves = tensors(SHAPE._replace(K=keys))
    torch._dynamo.reset()
    compiled = torch.compile(attention_fn, fullgraph=True, backend="aot_eager")
    expected = attention_fn(*leaves)
    ours = compiled(*leaves)
    torch.testing.assert_close(ours, expected)
    grads = torch.autograd.grad(ours.sum(), leaves)
    for own, other in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(own, other)


def test_named_backend_runs():
    leaves = tensors()
    expected = F.scaled_dot_product_attention(*leaves)
    torch.testing.assert_close(attention_fn(*leaves, backend="sdpa"), expected)
    out, lse = attention_fn(*leaves, backend="triton", return_lse=True)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (2, 4, 5)


def test_named_backend_never_falls_back_and_says_every_reason():
    with pytest.raises(NotImplementedError) as error:
        attention_fn(*tensors(), torch.zeros(5, 7), backend="flash_attn")
    for reason in ("flash_attn does not import", "cuda device", "float32", "additive mask"):
        assert reason in str(error.value)


def test_no_backend_for_a_call_is_an_error_with_every_reason():
    with pytest.raises(NotImplementedError) as error:
        attention_fn(*tensors(dtype=torch.float64), return_lse=True)
    for name in ("flash_attn", "triton", "sdpa cannot serve this call: does not return the LSE"):
        assert name in str(error.value)


def test_auto_leaves_the_interpreter_to_those_who_ask_for_it_or_have_no_other():
    explanation = explain(*tensors())
    assert explanation.chosen == "sdpa"
    assert "ask for it by name" in explanation.reasons["triton"][0]
    assert explain(*tensors(), return_lse=True).chosen == "triton"
    assert attention_fn(*tensors(), return_lse=True)[1].shape == (2, 4, 5)


def test_unknown_keywords_raise_type_error():
    with pytest.raises(TypeError, match="smooth_k"):
        attention_fn(*tensors(), smooth_k=True)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(5), torch.ones(5), torch.ones(5)), {}, "query must have shape"),
        ((torch.ones(1, 2, 5, 0),) * 3, {}, "query must have a head dim"),
        ((torch.ones(2, 5, 8), torch.ones(1, 2, 5, 8), torch.ones(2, 5, 8)), {}, "key must be 3-D"),
        ((torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 7), torch.ones(1, 2, 5, 8)), {}, "key must"),
        (
            (torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 6, 8)),
            {},
            "value must",
        ),
        (
            (torch.ones(1, 2, 5, 8), torch.ones(1, 1, 5, 8), torch.ones(1, 1, 5, 8)),
            {},
            "enable_gqa",
        ),
        (
            (torch.ones(1, 3, 5, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8)),
            {"enable_gqa": True},
            "key must have a number of heads that divides",
        ),
        (
            (torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8).half(), torch.ones(1, 2, 5, 8)),
            {},
            "key must have the dtype of query",
        ),
        (
            (torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8, device="meta")),
            {},
            "value must be on cpu",
        ),
        ((torch.ones(1, 2, 5, 8, dtype=torch.int32),) * 3, {}, "query must be float16"),
        ((torch.ones(1, 2, 5, 8),) * 3, {"dropout_p": 1.0}, "dropout_p must be in"),
        (
            (torch.ones(1, 2, 5, 8),) * 3,
            {"attn_mask": torch.ones(4, 5)},
            "attn_mask must broadcast",
        ),
        (
            (torch.ones(1, 2, 5, 8),) * 3,
            {"attn_mask": torch.ones(5, 5, dtype=torch.int64)},
            "attn_mask must be bool",
        ),
        (
            (torch.ones(1, 2, 5, 8),) * 3,
            {"attn_mask": torch.ones(5, 5), "is_causal": True},
            "attn_mask and is_causal",
        ),
        (
            (torch.ones(1, 2, 5, 8),) * 3,
            {"attn_mask": torch.ones(5, 5, device="meta")},
            "attn_mask must be on cpu",
        ),
        ((torch.ones(1, 2, 5, 8),) * 3, {"precision": "int4"}, "precision must be one of"),
        ((torch.ones(1, 2, 5, 8),) * 3, {"backend": "cudnn"}, "backend must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_by_name(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        attention_fn(*arguments, **options)
    with pytest.raises(ValueError, match=message):
        explain(*arguments, **options)


def test_one_key_does_not_hide_a_wrong_option():
    with pytest.raises(ValueError, match="precision must be one of"):
        attention_fn(*tensors(SHAPE._replace(K=1)), precision="int4")


def test_explain_gives_a_sentence_for_each_backend_and_runs_nothing():
    explanation = explain(*tensors())
    assert explanation.chosen == "sdpa"
    assert list(explanation.reasons) == ["native", "flash_attn", "triton", "flash_attn4", "sdpa"]
    assert re.search(r"flash_attn +flash_attn does not import", str(explanation))
    assert "sdpa serves" in str(explanation)
    meta = [tensor.to("meta") for tensor in tensors()]
    assert "needs a cuda device, got meta" in explain(*meta).reasons["triton"]


def test_explain_agrees_with_what_runs_for_a_named_backend():
    explanation = explain(*tensors(), backend="flash_attn")
    assert explanation.chosen is None
    assert "nothing serves" in str(explanation)


def test_a_described_call_needs_no_tensors():
    call = explain(*tensors()).call
    described = call._replace(device=torch.device("meta"), head_dim=520)
    reasons = explain_call(described).reasons["triton"]
    assert "takes head dims up to 256 in float32, got 520" in reasons


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"key": torch.zeros(2, 4, 7, 16, dtype=torch.float64)}, "key must have the dtype"),
        ({"key": torch.zeros(2, 4, 7, 16, device="meta")}, "key must be on cpu"),
        ({"value": torch.zeros(2, 4, 6, 16)}, "value must have shape"),
        ({"value": torch.zeros(2, 4, 7, 16, dtype=torch.float16)}, "value must have the dtype"),
        ({"key": torch.zeros(2, 2, 7, 16), "value": torch.zeros(2, 2, 7, 16)}, "enable_gqa"),
        ({"attn_mask": torch.zeros(5, 6)}, "attn_mask must broadcast"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int32)}, "attn_mask must be bool"),
        ({"attn_mask": torch.zeros(5, 7, device="meta")}, "attn_mask must be on cpu"),
        ({"attn_mask": torch.zeros(5, 7), "is_causal": True}, "exclude each other"),
        ({"dropout_p": 1.0}, "dropout_p must be in"),
        ({"precision": "fp4"}, "precision must be one of"),
        ({"backend": "none"}, "backend must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_like_an_earlier_one_is_checked_where_it_differs(change, refusal):
    query, key, value = tensors()
    served = {"query": query, "key": key, "value": value, "attn_mask": torch.zeros(5, 7)}
    if "is_causal" not in change:
        served.pop("attn_mask")
    for _ in range(2):
        attention_fn(**served)
    with pytest.raises(ValueError, match=refusal):
        attention_fn(**{**served, **change})


def test_no_more_calls_are_remembered_than_a_process_can_hold(monkeypatch):
    monkeypatch.setattr(attention, "_served", {})
    monkeypatch.setattr(attention, "MOST_SERVED", 4)
    for length in range(1, 12):
        attention_fn(*tensors(SHAPE._replace(Q=length)))
        assert 1 <= len(attention._served) <= 4


def test_int8_that_ends_in_sdpa_warns_once(fresh_announcements):
    with pytest.warns(UserWarning, match="does not quantise"):
        attention_fn(*tensors(), precision="int8")


def test_the_first_use_of_a_backend_is_logged_once(fresh_announcements, caplog):
    with caplog.at_level(logging.INFO, logger="ldm4ts_kernels"):
        attention_fn(*tensors())
        attention_fn(*tensors())
    assert [record.message for record in caplog.records] == [
        "attention backend in use: sdpa (precision exact)"
    ]


@pytest.fixture
def fresh_announcements(monkeypatch):
    from ldm4ts_kernels import attention, requirements

    announce = requirements.constant(attention._announce.__wrapped__)
    monkeypatch.setattr(attention, "_announce", announce)
    monkeypatch.setattr(attention, "_served", {})
