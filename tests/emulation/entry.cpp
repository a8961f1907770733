// What tests/test_csrc_emulated.py calls: the launchers of one head dim, compiled for the CPU.
#include <launch.cuh>

#include "../../csrc/dispatch.h"
#include "../../csrc/params.h"
#include "../../csrc/sm80/tiles.h"

extern "C" {

int params_bytes() { return sizeof(ldm::FlashParams); }

// Bytes of shared memory that the calls after it find.
void share(int bytes) { ldm::device_limits().shared_bytes = bytes; }

// Floats of workspace for p.statistics and p.dq_sums.
int64_t statistics_floats(const ldm::FlashParams* p) { return ldm::statistics_floats(*p); }
int64_t dq_floats(const ldm::FlashParams* p, int processors) {
  ldm::device_limits().processors = processors;
  if constexpr (LDM_HEAD_DIM > ldm::kMaxHeadDim)
    return 0;
  else
    return ldm::dq_floats<LDM_HEAD_DIM>(*p);
}

// Sets p.splits; floats of workspace for p.partial.
int64_t plan(ldm::FlashParams* p, int processors) {
  ldm::device_limits().processors = processors;
  return ldm::plan_flash_fwd<LDM_HEAD_DIM>(*p);
}

// Returns the launcher's code; *conflicts: bank conflicts of ldmatrix; *error: what went wrong.
int run(int backward, const ldm::FlashParams* p, int processors, int64_t* conflicts,
        const char** error) {
  emulation::machine().error.clear();
  emulation::machine().conflicts = 0;
  ldm::device_limits().processors = processors;
  int code = 0;
  if (!backward) code = ldm::launch_flash_fwd<LDM_HEAD_DIM>(*p, nullptr);
  if constexpr (LDM_HEAD_DIM <= ldm::kMaxHeadDim) {
    if (backward) code = ldm::launch_flash_bwd<LDM_HEAD_DIM>(*p, nullptr);
  }
  *conflicts = emulation::machine().conflicts;
  *error = emulation::machine().error.c_str();
  return code;
}

}  // extern "C"
