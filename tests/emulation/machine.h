// One thread block on the CPU: every CUDA thread is a fiber, run in turn until it must wait.
//
// Shared memory is an array that starts as NaN. Every access is checked: bounds, alignment, and
// order. Two threads may touch the same word between two barriers only if both read it; a word
// that an asynchronous copy will fill may not be touched before the copy was waited for, and is
// another thread's only after a barrier. What would be a race on a GPU is an error here, always.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace emulation {

constexpr int kLanes = 32;
constexpr int kStackBytes = 256 * 1024;

struct Copy {
  uint32_t address;
  const void* source;
  int bytes;
  bool valid;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  int epoch = 0;  // barriers passed
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

// A warp-wide operation happens when the last lane arrives; each lane then picks up its result.
struct Warp {
  int arrived = 0;
  int finished = 0;
  const void* operation = nullptr;
  alignas(16) unsigned char in[kLanes][64];
  alignas(16) unsigned char out[kLanes][64];
};

struct Word {
  int write_epoch = -1, writer = -1;
  int read_epoch = -1, reader = -1;  // reader −2: several
  int in_flight = 0;
};

class Machine {
 public:
  std::string error;      // the first one
  int64_t conflicts = 0;  // 8-row phases of ldmatrix that hit a bank twice
  std::vector<unsigned char> shared;

  void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    for (block = 0; block < blocks && error.empty(); ++block) run_block(threads, shared_bytes);
  }

  int64_t block = 0;
  int thread_index() const { return current_; }

  void fail(const std::string& what) {
    if (error.empty()) {
      error = what + " (block " + std::to_string(block) + ", thread " + std::to_string(current_) +
              ", barrier " + std::to_string(thread().epoch) + ")";
    }
  }

  // Returns whether x is true in any thread.
  bool barrier(bool x = false) {
    const int target = ++thread().epoch;
    if (x) votes_.insert(target);
    if (++at_barrier_ == static_cast<int>(threads_.size())) {
      at_barrier_ = 0;
      barriers_ = target;
    }
    wait_until([&] { return barriers_ >= target; });
    return votes_.count(target) > 0;
  }

  // Every lane calls with its `in`; `compute(ins, outs)` runs once, over all 32.
  template <typename In, typename Out, typename F>
  Out collective(const In& in, F compute) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "widen Warp's buffers");
    static const char kOperation = 0;  // one address an instantiation: one operation
    Warp& warp = warps_[current_ / kLanes];
    const int lane = current_ % kLanes;
    if (warp.arrived > 0 && warp.operation != &kOperation) fail("a warp diverged");
    warp.operation = &kOperation;
    std::memcpy(warp.in[lane], &in, sizeof(In));
    const int turn = warp.finished;
    if (++warp.arrived == kLanes) {
      In ins[kLanes];
      Out outs[kLanes];
      for (int i = 0; i < kLanes; ++i) std::memcpy(&ins[i], warp.in[i], sizeof(In));
      compute(ins, outs);
      for (int i = 0; i < kLanes; ++i) std::memcpy(warp.out[i], &outs[i], sizeof(Out));
      warp.arrived = 0;
      ++warp.finished;
    }
    wait_until([&] { return warp.finished != turn; });
    Out out;
    std::memcpy(&out, warp.out[lane], sizeof(Out));
    return out;
  }

  // ---- shared memory

  void read(uint32_t address, void* target, int bytes) {
    if (!in_bounds(address, bytes)) return;
    for (uint32_t w = address / 4; w < (address + bytes + 3) / 4; ++w) {
      Word& word = words_[w];
      if (word.in_flight) fail("read of a copy that was not waited for");
      if (word.write_epoch == thread().epoch && word.writer != current_) {
        fail("read without a barrier after another thread's write");
      }
      const bool again = word.read_epoch == thread().epoch && word.reader != current_;
      word.reader = again ? -2 : current_;
      word.read_epoch = thread().epoch;
    }
    std::memcpy(target, &shared[address], bytes);
  }

  void write(uint32_t address, const void* source, int bytes) {
    if (!in_bounds(address, bytes)) return;
    claim(address, bytes);
    std::memcpy(&shared[address], source, bytes);
  }

  void copy_async(uint32_t address, const void* source, int bytes, bool valid) {
    if (!in_bounds(address, bytes)) return;
    if (valid && reinterpret_cast<uintptr_t>(source) % bytes) fail("misaligned global copy");
    claim(address, bytes);
    for (uint32_t w = address / 4; w < (address + bytes) / 4; ++w) ++words_[w].in_flight;
    thread().open.push_back({address, source, bytes, valid});
  }

  void copy_commit() {
    thread().committed.push_back(std::move(thread().open));
    thread().open.clear();
  }

  void copy_wait(int pending) {
    while (static_cast<int>(thread().committed.size()) > pending) {
      for (const Copy& copy : thread().committed.front()) {
        for (uint32_t w = copy.address / 4; w < (copy.address + copy.bytes) / 4; ++w) {
          --words_[w].in_flight;
        }
        claim(copy.address, copy.bytes);
        if (copy.valid) std::memcpy(&shared[copy.address], copy.source, copy.bytes);
        if (!copy.valid) std::memset(&shared[copy.address], 0, copy.bytes);
      }
      thread().committed.pop_front();
    }
  }

  // The rows of one 8×8 matrix come from 8 different groups of 4 banks, or take longer.
  void count_conflicts(const uint32_t* addresses) {
    unsigned groups = 0;
    for (int i = 0; i < 8; ++i) groups |= 1u << (addresses[i] / 16 % 8);
    if (groups != 0xff) ++conflicts;
  }

 private:
  Thread& thread() { return *threads_[current_]; }

  bool in_bounds(uint32_t address, int bytes) {
    if (address % bytes == 0 && address + bytes <= shared.size()) return true;
    fail("shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address));
    return false;
  }

  // This thread writes these words now.
  void claim(uint32_t address, int bytes) {
    for (uint32_t w = address / 4; w < (address + bytes + 3) / 4; ++w) {
      Word& word = words_[w];
      const int epoch = thread().epoch;
      if (word.in_flight) fail("write over a copy in flight");
      if (word.write_epoch == epoch && word.writer != current_) fail("two threads write one word");
      if (word.read_epoch == epoch && word.reader != current_) {
        fail("write without a barrier after another thread's read");
      }
      word.write_epoch = epoch;
      word.writer = current_;
    }
  }

  template <typename F>
  void wait_until(F ready) {
    progress_ = true;
    while (!ready()) {
      swapcontext(&thread().context, &scheduler_);
    }
    progress_ = true;
  }

  static void enter() {
    Machine& self = instance();
    (*self.kernel_)();
    self.thread().done = true;
    self.progress_ = true;
    swapcontext(&self.thread().context, &self.scheduler_);
  }

  void run_block(int threads, int shared_bytes) {
    shared.assign(shared_bytes, 0xff);  // NaN as float16, bfloat16 and float32
    words_.assign((shared_bytes + 3) / 4, Word());
    warps_ = std::vector<Warp>(threads / kLanes);
    threads_.resize(threads);
    at_barrier_ = barriers_ = 0;
    votes_.clear();
    for (auto& thread : threads_) {
      if (!thread) thread = std::make_unique<Thread>();
      thread->done = false;
      thread->epoch = 0;
      thread->open.clear();
      thread->committed.clear();
      getcontext(&thread->context);
      thread->context.uc_stack = {thread->stack.get(), 0, kStackBytes};
      thread->context.uc_link = nullptr;
      makecontext(&thread->context, &Machine::enter, 0);
    }
    for (int running = threads; running > 0;) {
      progress_ = false;
      running = 0;
      for (current_ = 0; current_ < threads; ++current_) {
        if (thread().done) continue;
        swapcontext(&scheduler_, &thread().context);
        running += !thread().done;
      }
      current_ = 0;
      if (!progress_) return fail("deadlock: threads wait for one another");
    }
  }

  static Machine& instance();
  friend Machine& machine();

  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<Word> words_;
  int current_ = 0, at_barrier_ = 0, barriers_ = 0;
  std::set<int> votes_;  // the barriers at which a thread called something true
  bool progress_ = false;
};

inline Machine& Machine::instance() {
  static Machine the;
  return the;
}
inline Machine& machine() { return Machine::instance(); }

}  // namespace emulation
