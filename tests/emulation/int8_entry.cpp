// What tests/test_int8_emulated.py calls: the INT8 launchers of one head dim, compiled for the CPU.
#include <launch.cuh>

#include "../../csrc/params.h"
#include "../../csrc/sm80/int8_tiles.h"

extern "C" {

int params_bytes() { return sizeof(ldm::Int8Params); }
int parts(int k_len) { return ldm::key_parts(k_len); }

// Quantises and attends, or rounds the operands for the backward. Returns the launchers' code;
// *conflicts: bank conflicts of ldmatrix; *error: what went wrong.
int run(int backward, const ldm::Int8Params* p, int processors, int64_t* conflicts,
        const char** error) {
  emulation::machine().error.clear();
  emulation::machine().conflicts = 0;
  ldm::device_limits().processors = processors;
  int code =
      backward ? ldm::launch_round_operands(*p, nullptr) : ldm::launch_quantise_keys(*p, nullptr);
  if (!backward && !code) code = ldm::launch_int8_fwd<LDM_INT8_HEAD_DIM>(*p, nullptr);
  *conflicts = emulation::machine().conflicts;
  *error = emulation::machine().error.c_str();
  return code;
}

}  // extern "C"
