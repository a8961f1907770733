"""Translate every variant of the INT8 quantiser as Triton's compiler does, without a GPU.

    python -m tests.quantiser_variants

The interpreter runs what the compiler refuses: it compiles neither the branch that a program does
not take, nor a stride or length of 1 as the constant that Triton makes of it.
"""

import itertools
from collections.abc import Iterator

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from benchmarks.resources import meta_tensors, record_launches, source_of
from ldm4ts_kernels.kernels import quantize
from ldm4ts_kernels.kernels.int8_backward import dequantise
from ldm4ts_kernels.kernels.problem import Problem

HEAD_DIMS = (1, 40, 64, 80, 256)
HEADS = ((1, 1), (8, 2))  # of the query, of the key
LENGTHS = ((1, 1), (1, 1100), (784, 1), (49, 49), (4096, 77), (784, 784))


def problems() -> Iterator[Problem]:
    """Yield every combination of head dim, heads and lengths: one part of the mean, and many."""
    for head_dim, heads, lengths in itertools.product(HEAD_DIMS, HEADS, LENGTHS):
        dtype = torch.float16 if heads == (1, 1) else torch.bfloat16
        yield Problem(2, *heads, *lengths, head_dim, dtype, 0.125, int8=True)


def launch(problem: Problem) -> None:
    """Quantise with and without the LSE's shift, and take both back with and without the mean."""
    query, key, lse, _ = meta_tensors(problem)
    result = quantize.empty_quantised(query, key)
    for shift in (None, lse):
        quantize.quantise(problem, query, key, result, shift)
    transposed = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key))
    quantize.quantise(problem, *transposed, result, None)
    for with_mean in (False, True):
        dequantise(problem, result, problem.dtype, with_mean)


def main() -> None:
    """Translate each variant once."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({})
    seen = set()
    for problem in problems():
        for kernel, args, kwargs in record_launches(launch, problem):
            source = source_of(kernel, args, kwargs)
            if (variant := (kernel.__name__, source.hash())) in seen:
                continue
            seen.add(variant)
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            codegen = backend.get_codegen_implementation(options)
            source.make_ir(target, options, codegen, backend.get_module_map(), context)


if __name__ == "__main__":
    main()
