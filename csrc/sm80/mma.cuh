// The hardware, and nothing else: every instruction that plain C++ lacks, one function each.
// tests/emulation/sm80/mma.cuh implements the same functions on the CPU; include this one as
// <sm80/mma.cuh>, so that the search path decides.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"), with g = lane / 4 and t = lane % 4:
//   A (16×16): a[0] = (g, 2t..2t+1)  a[1] = (g+8, 2t..)  a[2] = (g, 2t+8..)  a[3] = (g+8, 2t+8..)
//   B (16×8):  b0 = (2t..2t+1, g)    b1 = (2t+8.., g)
//   C (16×8):  c[0..1] = (g, 2t..2t+1)  c[2..3] = (g+8, 2t..2t+1)
// m16n8k32 of INT8 has the same in bytes: where 2t..2t+1 counts 16-bit elements, 4t..4t+3 are INT8.
#pragma once
#include "../types.h"

#define LDM_DEVICE __device__ __forceinline__
#define LDM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define LDM_LIKELY(condition) __builtin_expect(condition, 1)
#define LDM_PARAMS_OF(type) const __grid_constant__ type
#define LDM_PARAMS LDM_PARAMS_OF(FlashParams)
#define LDM_UNROLL _Pragma("unroll")
#define LDM_ROLLED _Pragma("unroll 1")

namespace ldm {

extern __shared__ __align__(128) unsigned char shared_memory[];

LDM_DEVICE uint32_t shared_base() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}
LDM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same in every lane, and known to be.
LDM_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, thread_index() / kWarp, 0); }
LDM_DEVICE int64_t block_index() {
  uint32_t index;  // volatile: read anew by a block that starts again, not kept in a register
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
LDM_DEVICE void sync_block() { __syncthreads(); }
// The same, and whether x is true in any thread.
LDM_DEVICE bool any_thread(bool x) { return __syncthreads_or(x); }

// ---- arithmetic

LDM_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Never part of a fused multiply-add, which would round once where the oracle rounds twice.
LDM_DEVICE float product(float x, float y) { return __fmul_rn(x, y); }
LDM_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
LDM_DEVICE float natural_log(float x) { return __logf(x); }
LDM_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
LDM_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
LDM_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
LDM_DEVICE float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
// Rounds to nearest even; `lo` lands in the lower half of the word.
LDM_DEVICE uint32_t pack(Half, float lo, float hi) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
}
LDM_DEVICE uint32_t pack(BFloat16, float lo, float hi) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
}

// c += a · b
LDM_DEVICE void mma(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LDM_DEVICE void mma(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of four INT8 a word, where c's bits are counted up: see kIntegerZero.
LDM_DEVICE void mma(Int8, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t d[4];
  LDM_UNROLL for (int i = 0; i < 4; ++i) d[i] = __float_as_uint(c[i]);
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  LDM_UNROLL for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(d[i]);
}

// ---- sums in global memory that several blocks add to, one accumulator (16×8) of 128 floats each

// What two adds leave depends on their order. Only load_fragment knows where an element lies.
LDM_DEVICE void add_fragment(float* fragment, const float (&c)[4]) {
  LDM_UNROLL for (int e = 0; e < 4; ++e) {
    asm volatile(
        "red.global.add.f32 [%0], %1;" ::"l"(fragment + e * kWarp + thread_index() % kWarp),
        "f"(c[e])
        : "memory");
  }
}
LDM_DEVICE void load_fragment(float (&c)[4], const float* fragment) {
  LDM_UNROLL for (int e = 0; e < 4; ++e) c[e] = fragment[e * kWarp + thread_index() % kWarp];
}

// ---- shared memory, by 32-bit address

// Four 8×8 matrices of 16-bit elements; lanes 8i..8i+7 hold the addresses of matrix i's rows.
// Lane l receives from each: row l/4, elements 2(l%4) and 2(l%4)+1.
LDM_DEVICE void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}
// The same, each matrix transposed: lane l receives rows 2(l%4) and 2(l%4)+1 of column l/4.
LDM_DEVICE void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}
LDM_DEVICE void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
LDM_DEVICE void store_shared(uint32_t address, Chunk x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.words[0]),
               "r"(x.words[1]), "r"(x.words[2]), "r"(x.words[3])
               : "memory");
}
LDM_DEVICE void store_shared(uint32_t address, Integers x) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(x.words[0]), "r"(x.words[1])
               : "memory");
}
LDM_DEVICE Chunk load_shared_chunk(uint32_t address) {
  Chunk x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.words[0]), "=r"(x.words[1]), "=r"(x.words[2]), "=r"(x.words[3])
               : "r"(address)
               : "memory");
  return x;
}
LDM_DEVICE void store_shared(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
LDM_DEVICE void load_shared_pair(float& x, float& y, uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x), "=f"(y) : "r"(address) : "memory");
}
LDM_DEVICE void load_shared_quad(float (&x)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address)
               : "memory");
}

// ---- global memory, in whole vectors

LDM_DEVICE void store_pair(float* target, const float (&x)[2]) {
  *reinterpret_cast<float2*>(target) = make_float2(x[0], x[1]);
}
LDM_DEVICE void load_floats(float (&x)[8], const float* source) {
  LDM_UNROLL for (int i = 0; i < 2; ++i) {
    const float4 quad = reinterpret_cast<const float4*>(source)[i];
    x[4 * i] = quad.x, x[4 * i + 1] = quad.y, x[4 * i + 2] = quad.z, x[4 * i + 3] = quad.w;
  }
}

// ---- global → shared without registers; zeros where the source is not valid

LDM_DEVICE void copy_async_16(uint32_t address, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
LDM_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but this thread's latest kPending groups have arrived.
template <int kPending>
LDM_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace ldm
