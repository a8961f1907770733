import pytest
import torch
import torch.nn.functional as F

from ldm4ts_kernels import reference
from tests.cases import Shape, draw

CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 2, 5, 7, 8)


def test_output_and_gradients_are_those_of_sdpa():
    query, key, value = draw(SHAPE, torch.float64, CPU)
    mask = torch.randn(2, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    leaves = (query, key, value, mask)
    ours, _ = reference.attention(*leaves, scale=0.3)
    theirs = F.scaled_dot_product_attention(*leaves, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    dout = torch.randn_like(ours)
    for own, other in zip(
        torch.autograd.grad(ours, leaves, dout),
        torch.autograd.grad(theirs, leaves, dout),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (6, 6)])
def test_causal_is_aligned_as_sdpa_aligns_it(lengths):
    query, key, value = draw(Shape(1, 2, 2, *lengths, 8), torch.float64, CPU)
    ours, _ = reference.attention(query, key, value, is_causal=True)
    torch.testing.assert_close(
        ours, F.scaled_dot_product_attention(query, key, value, is_causal=True)
    )


def test_bottom_right_lets_the_last_query_see_the_last_key():
    query, key, value = draw(Shape(1, 1, 1, 3, 5, 8), torch.float64, CPU)
    visible = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    ours, _ = reference.attention(query, key, value, is_causal=True, bottom_right=True)
    torch.testing.assert_close(ours, reference.attention(query, key, value, visible)[0])


def test_window_hides_keys_further_than_its_sides():
    query, key, value = draw(Shape(1, 1, 1, 4, 4, 8), torch.float64, CPU)
    visible = torch.tensor(
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool
    )
    ours, _ = reference.attention(query, key, value, window=(2, 1))
    torch.testing.assert_close(ours, reference.attention(query, key, value, visible)[0])


def test_lse_is_the_log_sum_exp_of_the_scores():
    query, key, value = draw(SHAPE._replace(G=4), torch.float64, CPU)
    _, lse = reference.attention(query, key, value)
    torch.testing.assert_close(lse, (query @ key.mT * 8**-0.5).logsumexp(-1))


def test_softcap_bounds_the_scores():
    query, key, value = draw(SHAPE._replace(G=4), torch.float64, CPU, spread=50.0)
    _, lse = reference.attention(query, key, value, softcap=2.0)
    assert lse.max() <= 2.0 + torch.tensor(7.0).log()


def test_dropout_divides_what_it_keeps():
    query, key, value = draw(SHAPE._replace(G=4), torch.float64, CPU)
    keep = torch.rand(2, 4, 5, 7) > 0.3
    ours, _ = reference.attention(query, key, value, keep=keep, dropout_p=0.3)
    probabilities = (query @ key.mT * 8**-0.5).softmax(-1) * keep / 0.7
    torch.testing.assert_close(ours, probabilities @ value)


def test_a_row_that_sees_no_key_gives_zero_and_sends_no_gradient():
    query, key, value = draw(SHAPE._replace(G=4), torch.float64, CPU)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    out, lse = reference.attention(query, key, value, mask)
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, :, 2] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][:, :, 2] == 0).all()


def test_no_keys_give_zeros():
    query, key, value = draw(SHAPE._replace(K=0), torch.float64, CPU)
    out, lse = reference.attention(query, key, value)
    assert out.shape == (2, 4, 5, 8)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_gradcheck_passes_with_every_option_on():
    query, key, value = draw(Shape(1, 2, 1, 3, 4, 2), torch.float64, CPU)
    mask = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(1, 2, 3, 4) > 0.2

    def attend(*leaves):
        return reference.attention(
            *leaves, is_causal=True, softcap=3.0, scale=-0.7, keep=keep, dropout_p=0.2
        )

    assert torch.autograd.gradcheck(attend, (query, key, value, mask))
