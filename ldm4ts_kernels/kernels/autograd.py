"""How the attention operators meet autograd, and which of torch's transforms they do not know.

An operator that is called by itself differentiates as any other, once. The kernels' own autograd
Functions go below that, which saves the detour through it on every call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

NO_SECOND_DERIVATIVE = (
    "the gradient of this attention cannot be differentiated again: backend='sdpa' under"
    " torch.nn.attention.sdpa_kernel(SDPBackend.MATH) has second derivatives"
)


def is_transformed() -> bool:
    """Return whether torch.func (grad, vmap, jvp) or forward-mode AD looks at this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms() -> None:
    """Raise NotImplementedError under a transform, which would drop tangents without a word."""
    if is_transformed():
        raise NotImplementedError(
            "these kernels know neither torch.func nor forward-mode AD: backend='sdpa' does"
        )


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Call an operator whose gradient the caller sees to."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def within_backward(operator: Any, *arguments: Any) -> Any:
    """Call a backward operator; with `create_graph` so that its result is known not to go on."""
    if torch.is_grad_enabled():
        return operator(*arguments)
    return below_autograd(operator, *arguments)


def register_autograd(
    forward: torch._ops.OpOverload,
    backward: torch._ops.OpOverload,
    *,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., Any],
    library: torch.library.Library | None = None,
) -> None:
    """Make a forward operator differentiable by itself, and its backward refuse to be.

    `save(ctx, inputs, output)` keeps what `differentiate(ctx, *grads)` needs, as for
    `torch.library.register_autograd`.
    """

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)

    torch.library.register_autograd(forward.name(), differentiate, setup_context=save, lib=library)
    torch.library.register_autograd(backward.name(), refuse, lib=library)
