// Dropout: each weight is kept or dropped by a number drawn from the seed and its position alone
// (Philox-4x32-10, Salmon et al. 2011), so that the backward draws what the forward drew, in any
// order. kernels/primitives.py draws the same: a seed means the same mask in Triton.
#pragma once
#include "mask.cuh"

namespace ldm {

LDM_DEVICE uint32_t philox(uint64_t seed, uint32_t key, uint32_t query, uint32_t head) {
  uint32_t counter[4] = {key, query, head, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  LDM_UNROLL for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(counter[0]) * 0xD2511F53u;
    const uint64_t b = static_cast<uint64_t>(counter[2]) * 0xCD9E8D57u;
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ k0;
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ k1;
    counter[1] = static_cast<uint32_t>(b);
    counter[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter[0];
}

LDM_DEVICE bool is_kept(const FlashParams& p, int batch, int head, int query, int key) {
  const uint32_t bits = philox(*p.seed, static_cast<uint32_t>(key), static_cast<uint32_t>(query),
                               static_cast<uint32_t>(batch * p.heads + head));
  const int number = static_cast<int>(bits);  // uniform in [0, 1) by its 31 bits
  return static_cast<float>(number < 0 ? -number - 1 : number) * 4.6566127342e-10f >= p.dropout_p;
}

}  // namespace ldm
