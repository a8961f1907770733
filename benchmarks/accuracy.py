"""How far output and gradients lie from float64, exact and INT8, on a GPU: results/accuracy.csv.

    python -m benchmarks.accuracy

Normal query and key of standard deviation 1, 3 and 5, the key with a channel bias of 4, as trained
networks have it; value and dO of deviation 1. Self-attention of 1 x 4 heads, 2048 tokens.
"""

import itertools

import torch
from torch import Tensor

from benchmarks.measure import write_rows
from ldm4ts_kernels import attention_fn, reference
from ldm4ts_kernels.backends import CHAINS

TOKENS, HEADS, BIAS = 2048, 4, 4.0
NAMES = ("out", "dq", "dk", "dv")


def draw(head_dim: int, deviation: float, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return query, key and value, which want gradients, and dO; the same every time."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, HEADS, TOKENS, head_dim)
    query, key, value, dout = (
        torch.randn(shape, generator=generator, device="cuda") for _ in range(4)
    )
    bias = torch.randn((1, HEADS, 1, head_dim), generator=generator, device="cuda")
    tensors = (deviation * query, deviation * key + BIAS * bias, value)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], dout.to(dtype)


def results(out: Tensor, tensors: list[Tensor], dout: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(out, tensors, dout)
    return [tensor.detach().double().flatten() for tensor in (out, *grads)]


def main() -> None:
    """Measure every backend that serves here, print the table and write it."""
    rows = []
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for head_dim, (dtype_name, dtype), deviation in itertools.product(
        (64, 128), dtypes.items(), (1.0, 3.0, 5.0)
    ):
        tensors, dout = draw(head_dim, deviation, dtype)
        doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
        exact = results(reference.attention(*doubles)[0], doubles, dout.double())
        for precision, chain in CHAINS.items():
            for row in chain if precision == "exact" else chain[:-1]:
                try:
                    out = attention_fn(*tensors, precision=precision, backend=row.name)
                except NotImplementedError as refusal:
                    print(f"{row.name}: {str(refusal).splitlines()[0]}")
                    continue
                line: dict[str, object] = {
                    "head_dim": head_dim, "dtype": dtype_name, "deviation": deviation,
                    "backend": row.name,
                }  # fmt: skip
                for name, ours, true in zip(NAMES, results(out, tensors, dout), exact, strict=True):
                    line[f"{name}_l2"] = f"{(ours - true).norm() / true.norm():.2e}"
                    line[f"{name}_cosine"] = f"{torch.cosine_similarity(ours, true, 0):.6f}"
                rows.append(line)
                print(*line.values(), flush=True)
        write_rows("accuracy", rows)


if __name__ == "__main__":
    main()
