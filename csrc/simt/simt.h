// CUDA kernels as ordinary C++17 on the CPU, so that the sources of the GPU are tested, and run under sanitizers, on
// machines without one. One fiber for each CUDA thread, one block after another, one host thread. csrc/cuda/device.cuh
// includes this file where nvcc is not the compiler.
//
// What a run shows, for its inputs and its order of threads (set_thread_order):
//   - results, with shared memory that is poison until written, and asynchronous copies that land only when waited for;
//   - barriers and warp operations that the threads do not reach together, and the other faults that Error names;
//   - under AddressSanitizer: accesses out of bounds, of the heap and (by a single byte) of dynamic shared memory;
//   - under ThreadSanitizer: conflicting accesses without a barrier between them. Memory is ordered among the threads
//     of a block by __syncthreads and __syncwarp alone: shuffles, votes and matrix products order none, nor do atomics,
//     which are relaxed. Blocks are not ordered at all before the launch ends. Older threads are forgotten in the end:
//     a race between blocks further apart than detail::kRacers threads may be missed, between neighbours it is not.
//
// What it does not show: weak memory (what a thread writes is seen by all at once, and there are no fences); progress
// that depends on the hardware's scheduling (blocks that wait for each other, spin locks); what is limited by
// registers, occupancy, bank conflicts or time; the rounding of the GPU's own instructions, of contracted
// multiplications and additions, and of its tensor cores; barriers in different iterations of one loop.
//
// Linux with glibc. Under ThreadSanitizer and gcc 12, run without address randomisation: `setarch -R program`.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SPADE_FAST_SIMT_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define SPADE_FAST_SIMT_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPADE_FAST_SIMT_ASAN 1
#elif __has_feature(thread_sanitizer)
#define SPADE_FAST_SIMT_TSAN 1
#endif
#endif

#if defined(SPADE_FAST_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#elif defined(SPADE_FAST_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

// For functions that touch what the fibers share. ThreadSanitizer takes fibers for threads, and sees no order between
// them but the one that the kernel makes. No inlining: nothing may leak into functions that are checked.
#if defined(SPADE_FAST_SIMT_TSAN) && defined(__clang__)
#define SPADE_FAST_SIMT_UNCHECKED __attribute__((noinline, disable_sanitizer_instrumentation))
#elif defined(SPADE_FAST_SIMT_TSAN)
#define SPADE_FAST_SIMT_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
#else
#define SPADE_FAST_SIMT_UNCHECKED
#endif

// For functions that change stacks: whatever the compiler finds out about their registers and memory would be wrong.
#if defined(__clang__)
#define SPADE_FAST_SIMT_SWITCH __attribute__((noinline, no_sanitize_address, no_sanitize_thread))
#else
#define SPADE_FAST_SIMT_SWITCH __attribute__((noipa, no_sanitize_address, no_sanitize_thread))
#endif

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // set at every switch of fibers; kernels only read them

namespace spade_fast::simt {

// A fault of the kernel or of its launch. The text names its kind, the block and the thread.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Fills shared memory before a block runs: NaN as float and as double, an unlikely integer.
constexpr uint32_t kPoison = 0xFFFDFDFDu;

namespace detail {

constexpr int kMaxThreads = 1024, kWarp = 32, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxShared = 227 * 1024;
#if defined(SPADE_FAST_SIMT_ASAN) || defined(SPADE_FAST_SIMT_TSAN)
constexpr size_t kStack = 256 * 1024;  // a sanitizer writes its report on the stack of the fiber it finds at fault
#else
constexpr size_t kStack = 64 * 1024;
#endif
// Threads of a launch that ThreadSanitizer tells apart, or two blocks where that is more. Each takes nearly a megabyte.
constexpr size_t kRacers = 1024;
constexpr size_t kOrders = 1024;  // objects through which ThreadSanitizer sees order, in each block

enum class Kind { kSyncWarp, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot, kAny, kAll, kMma };

inline const char* name(Kind kind) {
  constexpr const char* names[] = {"__syncwarp",       "__shfl_sync",     "__shfl_up_sync",
                                   "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync",
                                   "__any_sync",       "__all_sync",      "mma_m16n8k8_tf32"};
  return names[static_cast<int>(kind)];
}

// What a lane brings to a warp operation, on its own stack; whoever comes last fills in the results of all.
struct Exchange {
  uint64_t value;
  int source;
  uint64_t result;
};
struct Vote {
  bool predicate;
  unsigned result;
};
struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
  int64_t group;
};

// The asynchronous copies of one thread, oldest first. On the stack of its fiber, as no other thread looks at them.
struct Copies {
  std::vector<Copy> open;
  int64_t group = 0;
};

struct Context {
  void* registers[5];
#if defined(SPADE_FAST_SIMT_ASAN)
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
#elif defined(SPADE_FAST_SIMT_TSAN)
  void* racer = nullptr;
#endif
};

enum class Status { kReady, kAtBarrier, kAtOperation, kEnded };

struct Thread {
  Context context;
  dim3 index;
  int number;
  Status status;
  void* operand;
  Copies* copies;
};

// One warp operation, from the first lane's arrival until the last one has left it. Lanes may be in several at a time.
struct Operation {
  Kind kind;
  unsigned mask, arrived, left;
  size_t order;
};

struct Warp {
  unsigned existing, ended, at_barrier;
  unsigned used;  // operations, as bits: each has a lane that has not left it, so there are never more than lanes
  Operation operations[kWarp];
};

// Plain arrays throughout: what is called from an unchecked function must be unchecked as well.
struct State {
  std::atomic_flag running = ATOMIC_FLAG_INIT;
  unsigned seed = 0;

  Context host;
  Context *current_context = nullptr, *previous_context = nullptr;
  Thread* current = nullptr;
  Thread threads[kMaxThreads];
  int fibers = 0;  // threads that have a stack and stand at their beginning
  char* stacks = nullptr;

  int count = 0, ready = 0, live = 0, waiting = 0;  // threads of the block; `waiting` at the barrier
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  unsigned barriers = 0;
  size_t operations = 0;
  Warp warps[kMaxWarps];

  unsigned short order[kMaxThreads];
  int position = 0;
  uint64_t random = 0;

  const std::function<void()>* kernel = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;

  bool failed = false;
  std::exception_ptr failure;

#if defined(SPADE_FAST_SIMT_TSAN)
  char start, end;  // released by the host and acquired by the threads, and the other way round
  uint64_t* orders = nullptr;
  void* racers[2 * kMaxThreads] = {};
#endif
};

inline State state;

struct Cancelled {};  // unwinds the other threads of a block where one has failed

[[noreturn]] inline void fault(const std::string& what) {
  const auto text = [](const dim3& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
  };
  throw Error("simt: " + what + ": block " + text(blockIdx) + ", thread " + text(threadIdx));
}

// ---- Memory order, for ThreadSanitizer alone

#if defined(SPADE_FAST_SIMT_TSAN)
SPADE_FAST_SIMT_UNCHECKED inline void release(size_t order) {
  __tsan_release(state.orders + order);
}
SPADE_FAST_SIMT_UNCHECKED inline void acquire(size_t order) {
  __tsan_acquire(state.orders + order);
}
SPADE_FAST_SIMT_UNCHECKED inline void acquire_start() {
  __tsan_acquire(&state.start);
}
SPADE_FAST_SIMT_UNCHECKED inline void release_end() {
  __tsan_release(&state.end);
}
#else
inline void release(size_t) {}
inline void acquire(size_t) {}
inline void acquire_start() {}
inline void release_end() {}
#endif

// ---- Fibers

// Says to AddressSanitizer which stack is in use now; learns the bounds of the one that was (the host's, above all).
SPADE_FAST_SIMT_UNCHECKED inline void arrive() {
#if defined(SPADE_FAST_SIMT_ASAN)
  Context& previous = *state.previous_context;
  __sanitizer_finish_switch_fiber(state.current_context->fake_stack, &previous.stack, &previous.stack_bytes);
#endif
}

SPADE_FAST_SIMT_UNCHECKED inline void depart(Context& next) {
#if defined(SPADE_FAST_SIMT_ASAN)
  __sanitizer_start_switch_fiber(&state.current_context->fake_stack, next.stack, next.stack_bytes);
#elif defined(SPADE_FAST_SIMT_TSAN)
  __tsan_switch_to_fiber(next.racer, __tsan_switch_to_fiber_no_sync);
#endif
  state.previous_context = state.current_context;
  state.current_context = &next;
}

// By the compiler's own setjmp, whose jump must be in another function. The library's refuses other stacks under
// _FORTIFY_SOURCE, and has AddressSanitizer forget the whole stack; swapcontext makes a system call.
[[noreturn]] SPADE_FAST_SIMT_SWITCH inline void jump(void** registers) {
  __builtin_longjmp(registers, 1);
}

SPADE_FAST_SIMT_SWITCH inline void switch_to(Context& next) {
  depart(next);
  if (__builtin_setjmp(state.previous_context->registers) == 0) jump(next.registers);
  __asm__ volatile("" ::: "memory");
  arrive();
}

// xorshift64*
SPADE_FAST_SIMT_UNCHECKED inline unsigned random_below(unsigned bound) {
  state.random ^= state.random >> 12;
  state.random ^= state.random << 25;
  state.random ^= state.random >> 27;
  return static_cast<unsigned>((((state.random * 0x2545F4914F6CDD1Du) >> 32) * bound) >> 32);
}

// A round runs every thread that is ready when its turn comes, once.
SPADE_FAST_SIMT_UNCHECKED inline void begin_round() {
  state.position = 0;
  if (state.seed < 2) return;
  for (unsigned i = static_cast<unsigned>(state.count) - 1; i > 0; --i) {
    const unsigned j = random_below(i + 1);
    const unsigned short other = state.order[i];
    state.order[i] = state.order[j];
    state.order[j] = other;
  }
}

// To the next ready thread, or to the host when none is left. There is one of them where some are left.
SPADE_FAST_SIMT_UNCHECKED inline void switch_to_next() {
  if (state.live == 0) {
    state.current = nullptr;
    switch_to(state.host);
    return;
  }
  Thread* next;
  do {
    if (state.position == state.count) begin_round();
    next = &state.threads[state.order[state.position++]];
  } while (next->status != Status::kReady);
  threadIdx = next->index;
  state.current = next;
  if (&next->context != state.current_context) switch_to(next->context);
}

SPADE_FAST_SIMT_UNCHECKED inline int this_lane() {
  return state.current->number % kWarp;
}
SPADE_FAST_SIMT_UNCHECKED inline Copies& this_copies() {
  return *state.current->copies;
}
SPADE_FAST_SIMT_UNCHECKED inline size_t this_shared_bytes() {
  return state.shared_bytes;
}
SPADE_FAST_SIMT_UNCHECKED inline void set_copies(Copies* copies) {
  state.current->copies = copies;
}
SPADE_FAST_SIMT_UNCHECKED inline bool has_failed() {
  return state.failed;
}

// Returns when another thread, or the caller beforehand, has made the caller ready.
SPADE_FAST_SIMT_UNCHECKED inline void yield() {
  if (state.ready == 0) fault("deadlock");
  switch_to_next();
  if (state.failed) throw Cancelled();
}

SPADE_FAST_SIMT_UNCHECKED inline void set_waiting(Thread& thread, Status status) {
  thread.status = status;
  --state.ready;
}

SPADE_FAST_SIMT_UNCHECKED inline void set_ready(Thread& thread) {
  thread.status = Status::kReady;
  ++state.ready;
}

// The first failure is the one that launch throws; all threads that wait get ready to be unwound.
SPADE_FAST_SIMT_UNCHECKED inline bool set_failed() {
  if (state.failed) return false;
  state.failed = true;
  for (int i = 0; i < state.count; ++i) {
    Thread& thread = state.threads[i];
    if (thread.status == Status::kAtBarrier || thread.status == Status::kAtOperation) set_ready(thread);
  }
  return true;
}

// An operation that still gathers lanes, this one among them. Null where there is none.
SPADE_FAST_SIMT_UNCHECKED inline const Operation* operation_that_names(const Warp& warp, unsigned lane) {
  for (unsigned used = warp.used; used != 0; used &= used - 1) {
    const Operation& operation = warp.operations[__builtin_ctz(used)];
    if (operation.arrived != operation.mask && (operation.mask & lane)) return &operation;
  }
  return nullptr;
}

SPADE_FAST_SIMT_UNCHECKED inline void leave_block() {
  Warp& warp = state.warps[state.current->number / kWarp];
  const unsigned lane = 1u << state.current->number % kWarp;
  if (const Operation* operation = operation_that_names(warp, lane)) {
    fault(std::string("lane has exited, but the mask of ") + name(operation->kind) + " names it");
  }
  if (state.waiting > 0) fault("divergent barrier: thread has exited, but others wait at __syncthreads");
  if (state.ready == 1 && state.live > 1) fault("deadlock");
  warp.ended |= lane;
}

inline void run_thread() {
  acquire_start();
  try {
    if (!has_failed()) {
      Copies copies;
      set_copies(&copies);
      (*state.kernel)();
      if (!copies.open.empty()) fault("thread has exited without waiting for its asynchronous copies");
      leave_block();
    }
  } catch (const Cancelled&) {
  } catch (...) {
    if (set_failed()) state.failure = std::current_exception();
  }
  release_end();
}

// Runs one thread for every block, until the process ends.
SPADE_FAST_SIMT_UNCHECKED inline void fiber() {
  arrive();
  switch_to(state.host);
  for (;;) {
    run_thread();
    state.current->status = Status::kEnded;
    --state.ready;
    --state.live;
    switch_to_next();
  }
}

inline size_t page_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}
inline size_t whole_pages(size_t bytes) {
  return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}
inline size_t stack_stride() {
  return page_bytes() + kStack;
}

inline char* map_memory(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

SPADE_FAST_SIMT_SWITCH inline void enter_fiber(ucontext_t& fiber, Context& context) {
  depart(context);
  if (__builtin_setjmp(state.host.registers) == 0) setcontext(&fiber);
  arrive();
}

// Leaves a thread's fiber at its beginning, on a stack with a page below it that may not be touched.
inline void make_fiber(int number) {
  char* guard = state.stacks + static_cast<size_t>(number) * stack_stride();
  if (mprotect(guard, page_bytes(), PROT_NONE) != 0) throw std::bad_alloc();
  ucontext_t registers;
  getcontext(&registers);
  registers.uc_stack.ss_sp = guard + page_bytes();
  // The tops of the stacks lie apart: at the same place of every page they would fight for the same cache lines.
  registers.uc_stack.ss_size = kStack - static_cast<size_t>(number) % 16 * 256;
  registers.uc_link = nullptr;
  makecontext(&registers, fiber, 0);
  Context& context = state.threads[number].context;
#if defined(SPADE_FAST_SIMT_ASAN)
  context.stack = registers.uc_stack.ss_sp;
  context.stack_bytes = registers.uc_stack.ss_size;
#elif defined(SPADE_FAST_SIMT_TSAN)
  context.racer = state.host.racer;
#endif
  enter_fiber(registers, context);
}

// ---- A block

#if defined(SPADE_FAST_SIMT_TSAN)

// Blocks are not ordered, so that all memory they would reuse must be unknown to ThreadSanitizer in each: it forgets
// what is unmapped. Racers are its threads: they are costly to make, and taken up again in turn.
class BlockMemory {
 public:
  explicit BlockMemory(size_t shared_bytes) : shared_bytes_(shared_bytes) {}
  ~BlockMemory() { unmap(); }
  BlockMemory(const BlockMemory&) = delete;
  BlockMemory& operator=(const BlockMemory&) = delete;

  char* renew() {
    unmap();
    const size_t orders = whole_pages(kOrders * sizeof(uint64_t)), shared = whole_pages(shared_bytes_);
    const size_t bytes = orders + shared + static_cast<size_t>(state.count) * stack_stride();
    mapped_ = map_memory(bytes);
    mapped_bytes_ = bytes;
    state.orders = reinterpret_cast<uint64_t*>(mapped_);
    state.stacks = mapped_ + orders + shared;
    for (int i = 0; i < state.count; ++i) {
      make_fiber(i);
      void*& racer = state.racers[next_racer_++ % std::max(kRacers, 2 * static_cast<size_t>(state.count))];
      if (!racer) racer = __tsan_create_fiber(0);
      state.threads[i].context.racer = racer;
    }
    return mapped_ + orders;
  }

 private:
  void unmap() {
    if (mapped_) munmap(mapped_, mapped_bytes_);
    mapped_ = nullptr;
  }

  size_t shared_bytes_, mapped_bytes_ = 0, next_racer_ = 0;
  char* mapped_ = nullptr;
};

#else

// Shared memory of exactly the size asked for, and fibers that are made once.
class BlockMemory {
 public:
  explicit BlockMemory(size_t shared_bytes) : shared_(new char[shared_bytes]) {}

  char* renew() {
    if (!state.stacks) state.stacks = map_memory(kMaxThreads * stack_stride());
    for (; state.fibers < state.count; ++state.fibers) make_fiber(state.fibers);
    return shared_.get();
  }

 private:
  std::unique_ptr<char[]> shared_;
};

#endif

inline void poison(void* memory, size_t bytes) {
  char* at = static_cast<char*>(memory);
  for (size_t i = 0; i < bytes; i += sizeof(kPoison)) {
    std::memcpy(at + i, &kPoison, std::min(sizeof(kPoison), bytes - i));
  }
}

SPADE_FAST_SIMT_UNCHECKED inline void set_block_index(uint64_t number) {
  const uint64_t rest = number / gridDim.x;
  blockIdx.x = static_cast<unsigned>(number % gridDim.x);
  blockIdx.y = static_cast<unsigned>(rest % gridDim.y);
  blockIdx.z = static_cast<unsigned>(rest / gridDim.y);
}

inline void run_block(BlockMemory& memory) {
  state.current_context = &state.host;
#if defined(SPADE_FAST_SIMT_TSAN)
  state.host.racer = __tsan_get_current_fiber();
#endif
  state.shared = memory.renew();
  poison(state.shared, state.shared_bytes);
  const int count = state.count;
  for (int i = 0; i < count; ++i) {
    Thread& thread = state.threads[i];
    const unsigned number = static_cast<unsigned>(i), rest = number / blockDim.x;
    thread.index = dim3(number % blockDim.x, rest % blockDim.y, rest / blockDim.y);
    thread.number = i;
    thread.status = Status::kReady;
  }
  for (int first = 0; first < count; first += kWarp) {
    Warp& warp = state.warps[first / kWarp];
    warp.existing = count - first >= kWarp ? ~0u : (1u << (count - first)) - 1;
    warp.ended = warp.at_barrier = warp.used = 0;
  }
  state.ready = state.live = count;
  state.waiting = 0;
  state.position = count;
  state.barriers = 0;
  state.operations = 0;
#if defined(SPADE_FAST_SIMT_TSAN)
  __tsan_release(&state.start);
#endif
  switch_to_next();
}

inline void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const auto refuse = [](const char* what, uint64_t x, uint64_t y, uint64_t z) {
    throw Error(std::string("simt: launch with ") + what + ": " + std::to_string(x) + ", " + std::to_string(y) + ", " +
                std::to_string(z));
  };
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const auto most = static_cast<uint64_t>(kMaxThreads);
  if (block.x > most || block.y > most || block.z > 64 || threads == 0 || threads > most) {
    refuse("a block outside CUDA's limits", block.x, block.y, block.z);
  }
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid outside CUDA's limits", grid.x, grid.y, grid.z);
  }
  if (shared_bytes > kMaxShared) {
    throw Error("simt: launch with " + std::to_string(shared_bytes) + " bytes of shared memory, more than " +
                std::to_string(kMaxShared));
  }
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (blocks == 0) return;
  if (state.running.test_and_set()) throw Error("simt: launch within a launch");
  struct Running {
    ~Running() { state.running.clear(); }
  } running;

  blockDim = block;
  gridDim = grid;
  state.count = static_cast<int>(threads);
  state.shared_bytes = shared_bytes;
  state.kernel = &kernel;
  state.failed = false;
  state.random = (state.seed + 1ull) * 0x9E3779B97F4A7C15u;
  std::iota(state.order, state.order + state.count, static_cast<unsigned short>(0));
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t(0));
  if (state.seed == 1) {
    std::reverse(state.order, state.order + state.count);
    std::reverse(order.begin(), order.end());
  } else if (state.seed > 1) {
    for (uint64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[random_below(static_cast<unsigned>(i + 1))]);
  }

  BlockMemory memory(shared_bytes);
  for (uint64_t number : order) {
    set_block_index(number);
    run_block(memory);
    if (has_failed()) break;
  }
#if defined(SPADE_FAST_SIMT_TSAN)
  __tsan_acquire(&state.end);
#endif
  if (has_failed()) std::rethrow_exception(std::exchange(state.failure, nullptr));
}

// ---- Barriers and warp operations

SPADE_FAST_SIMT_UNCHECKED inline void block_barrier(const char* file, int line) {
  Thread& self = *state.current;
  Warp& warp = state.warps[self.number / kWarp];
  const unsigned lane = 1u << self.number % kWarp;
  const auto here = [file, line] { return std::string(file) + ":" + std::to_string(line); };
  if (state.live < state.count) fault("divergent barrier: others have exited before __syncthreads at " + here());
  if (const Operation* operation = operation_that_names(warp, lane)) {
    fault("divergent barrier: lane waits at __syncthreads at " + here() + ", but the mask of " + name(operation->kind) +
          " names it");
  }
  if (state.waiting > 0 && (line != state.barrier_line || std::strcmp(file, state.barrier_file) != 0)) {
    fault("divergent barrier: __syncthreads at " + here() + ", but others wait at " + state.barrier_file + ":" +
          std::to_string(state.barrier_line));
  }
  state.barrier_file = file;
  state.barrier_line = line;
  const unsigned order = state.barriers & 1;  // the next barrier's arrivals are no part of this one
  release(order);
  warp.at_barrier |= lane;
  set_waiting(self, Status::kAtBarrier);
  if (++state.waiting == state.count) {
    for (int i = 0; i < state.count; ++i) set_ready(state.threads[i]);
    for (int i = 0; i < state.count; i += kWarp) state.warps[i / kWarp].at_barrier = 0;
    state.waiting = 0;
    ++state.barriers;
    state.position = state.count;
  }
  yield();
  acquire(order);
}

SPADE_FAST_SIMT_UNCHECKED inline void multiply_fragments(Thread* lanes) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& from = *static_cast<const Fragments*>(lanes[lane].operand);
    const int g = lane / 4, t = lane % 4;
    const auto put = [](float& to, uint32_t bits) {
      bits &= ~0x1FFFu;
      __builtin_memcpy(&to, &bits, sizeof(to));
    };
    put(a[g][t], from.a[0]);
    put(a[g + 8][t], from.a[1]);
    put(a[g][t + 4], from.a[2]);
    put(a[g + 8][t + 4], from.a[3]);
    put(b[t][g], from.b[0]);
    put(b[t + 4][g], from.b[1]);
  }
  double d[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 8; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += static_cast<double>(a[m][k]) * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* to = static_cast<const Fragments*>(lanes[lane].operand)->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(to[i] + d[g + i / 2 * 8][2 * t + i % 2]);
  }
}

// Gives every lane of the mask its result.
SPADE_FAST_SIMT_UNCHECKED inline void finish(Kind kind, unsigned mask, Thread* lanes) {
  if (kind == Kind::kSyncWarp) return;
  if (kind == Kind::kMma) return multiply_fragments(lanes);
  const bool votes = kind == Kind::kBallot || kind == Kind::kAny || kind == Kind::kAll;
  unsigned ballot = 0;
  for (unsigned rest = votes ? mask : 0; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (static_cast<const Vote*>(lanes[lane].operand)->predicate) ballot |= 1u << lane;
  }
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    void* operand = lanes[__builtin_ctz(rest)].operand;
    if (votes) {
      static_cast<Vote*>(operand)->result = ballot;
    } else {
      Exchange& exchange = *static_cast<Exchange*>(operand);
      exchange.result = static_cast<const Exchange*>(lanes[exchange.source].operand)->value;
    }
  }
}

SPADE_FAST_SIMT_UNCHECKED inline void warp_operation(Kind kind, unsigned mask, void* operand) {
  Thread& self = *state.current;
  Warp& warp = state.warps[self.number / kWarp];
  const unsigned lane = 1u << self.number % kWarp;
  if (mask & ~warp.existing) fault(std::string("mask of ") + name(kind) + " names lanes that do not exist");
  if (!(mask & lane)) fault(std::string("mask of ") + name(kind) + " does not name its own lane");
  if (mask & warp.ended) fault(std::string("mask of ") + name(kind) + " names lanes that have exited");
  if (mask & warp.at_barrier) {
    fault(std::string("divergent barrier: mask of ") + name(kind) + " names lanes that wait at __syncthreads");
  }
  // Lanes may wait for one that is in another operation first. Where both wait for each other, none can go on.
  int slot = -1;
  for (unsigned used = warp.used; used != 0; used &= used - 1) {
    const int i = __builtin_ctz(used);
    const Operation& other = warp.operations[i];
    if (other.arrived == other.mask) continue;
    if (other.kind == kind && other.mask == mask) {
      slot = i;
    } else if ((other.mask & lane) && (other.arrived & mask)) {
      if (other.kind == kind) fault(std::string("lanes of a warp arrive at ") + name(kind) + " with different masks");
      fault(std::string("lanes of a warp arrive at different operations: ") + name(kind) + " and " + name(other.kind));
    }
  }
  if (slot < 0) {
    slot = __builtin_ctz(~warp.used);
    warp.used |= 1u << slot;
    Operation& fresh = warp.operations[slot];
    fresh.kind = kind;
    fresh.mask = mask;
    fresh.arrived = fresh.left = 0;
    fresh.order = 2 + state.operations++ % (kOrders - 2);
  }
  Operation& operation = warp.operations[slot];
  if (kind == Kind::kSyncWarp) release(operation.order);
  operation.arrived |= lane;
  self.operand = operand;
  set_waiting(self, Status::kAtOperation);
  if (operation.arrived == mask) {
    Thread* lanes = state.threads + self.number / kWarp * kWarp;
    finish(kind, mask, lanes);
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) set_ready(lanes[__builtin_ctz(rest)]);
  }
  yield();
  if (kind == Kind::kSyncWarp) acquire(operation.order);
  operation.left |= lane;
  if (operation.left == mask) warp.used &= ~(1u << slot);
}

template <class T>
T shuffle(Kind kind, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "T of 4 or 8 bytes");
  if (!(mask >> source & 1u)) fault(std::string(name(kind)) + " reads a lane outside its mask");
  Exchange exchange = {0, source, 0};
  std::memcpy(&exchange.value, &value, sizeof(T));
  warp_operation(kind, mask, &exchange);
  std::memcpy(&value, &exchange.result, sizeof(T));
  return value;
}

inline unsigned vote(Kind kind, unsigned mask, bool predicate) {
  Vote vote = {predicate, 0};
  warp_operation(kind, mask, &vote);
  return vote.result;
}

}  // namespace detail

// Calls kernel() once for each thread of each block. Returns when all have ended; throws Error where it finds a fault,
// or what a kernel throws, and can be used again after that. An empty grid runs nothing.
template <class Kernel>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel&& kernel) {
  detail::run(grid, block, shared_bytes, std::ref(kernel));
}

// 0: threads and blocks in ascending order; 1: descending; else pseudo-random, threads anew in every round. The same
// seed gives the same order at every launch.
inline void set_thread_order(unsigned seed) {
  detail::state.seed = seed;
}

// The dynamic shared memory of the current block.
SPADE_FAST_SIMT_UNCHECKED inline void* shared_memory() {
  return detail::state.shared;
}

// cp.async of 4, 8 or 16 bytes to shared memory, both addresses aligned to that; zeros, and no read, where !valid. The
// bytes land when this thread waits for them. Until then they are poison: the hardware may write them at any time.
inline void cp_async(void* shared, const void* global, int bytes, bool valid) {
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    detail::fault("asynchronous copy of " + std::to_string(bytes) + " bytes: only 4, 8 and 16 are possible");
  }
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % static_cast<unsigned>(bytes) != 0) {
    detail::fault("misaligned asynchronous copy of " + std::to_string(bytes) + " bytes");
  }
  const auto at = reinterpret_cast<uintptr_t>(shared), begin = reinterpret_cast<uintptr_t>(shared_memory());
  if (at < begin || at + static_cast<unsigned>(bytes) > begin + detail::this_shared_bytes()) {
    detail::fault("asynchronous copy to memory that is not the block's shared memory");
  }
  detail::poison(shared, static_cast<size_t>(bytes));
  if (valid) {  // read here too, so that a sanitizer's report leads to where the address was named
    const auto* first = static_cast<const volatile unsigned char*>(global);
    (void)first[0];
    (void)first[bytes - 1];
  }
  detail::Copies& copies = detail::this_copies();
  copies.open.push_back({shared, global, bytes, valid, copies.group});
}

inline void cp_async_commit() {
  ++detail::this_copies().group;
}

template <int N>
void cp_async_wait() {
  static_assert(N >= 0, "a number of groups");
  detail::Copies& copies = detail::this_copies();
  const auto later = std::find_if(copies.open.begin(), copies.open.end(),
                                  [&](const detail::Copy& copy) { return copy.group >= copies.group - N; });
  for (auto copy = copies.open.begin(); copy != later; ++copy) {
    if (copy->valid) {
      std::memcpy(copy->shared, copy->global, static_cast<size_t>(copy->bytes));
    } else {
      std::memset(copy->shared, 0, static_cast<size_t>(copy->bytes));
    }
  }
  copies.open.erase(copies.open.begin(), later);
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32, d += a b, with the fragments of the PTX manual:
//
//     g = lane / 4, t = lane % 4:  a = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b = (t, g), (t + 4, g);
//                                  d = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//
// The low 13 bits of a and b are ignored. Products are exact, sums are in double, and rounded to float once.
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  detail::Fragments fragments = {d, a, b};
  detail::warp_operation(detail::Kind::kMma, ~0u, &fragments);
}

}  // namespace spade_fast::simt

// ---- What CUDA has in the global namespace. The width of a shuffle is always 32.

// The place of the call: threads that wait at different ones are a fault.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  spade_fast::simt::detail::block_barrier(file, line);
}

inline void __syncwarp(unsigned mask = ~0u) {
  spade_fast::simt::detail::warp_operation(spade_fast::simt::detail::Kind::kSyncWarp, mask, nullptr);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return spade_fast::simt::detail::shuffle(spade_fast::simt::detail::Kind::kShuffle, mask, value, source & 31);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int lane = spade_fast::simt::detail::this_lane(), source = delta > 31u ? -1 : lane - static_cast<int>(delta);
  return spade_fast::simt::detail::shuffle(spade_fast::simt::detail::Kind::kShuffleUp, mask, value,
                                           source < 0 ? lane : source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = spade_fast::simt::detail::this_lane(), source = delta > 31u ? 32 : lane + static_cast<int>(delta);
  return spade_fast::simt::detail::shuffle(spade_fast::simt::detail::Kind::kShuffleDown, mask, value,
                                           source > 31 ? lane : source);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  const int lane = spade_fast::simt::detail::this_lane(), source = lane ^ bits;
  return spade_fast::simt::detail::shuffle(spade_fast::simt::detail::Kind::kShuffleXor, mask, value,
                                           source < 0 || source > 31 ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return spade_fast::simt::detail::vote(spade_fast::simt::detail::Kind::kBallot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return spade_fast::simt::detail::vote(spade_fast::simt::detail::Kind::kAny, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return spade_fast::simt::detail::vote(spade_fast::simt::detail::Kind::kAll, mask, predicate != 0) == mask;
}

namespace spade_fast::simt::detail {

template <class T>
T atomic_max(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace spade_fast::simt::detail

inline int atomicAdd(int* address, int value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline int atomicMax(int* address, int value) {
  return spade_fast::simt::detail::atomic_max(address, value);
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  return spade_fast::simt::detail::atomic_max(address, value);
}
inline int atomicOr(int* address, int value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// As CUDA's: of a number and a NaN, the number.
template <class T>
std::enable_if_t<std::is_arithmetic<T>::value, T> min(T a, T b) {
  return b < a || a != a ? b : a;
}
template <class T>
std::enable_if_t<std::is_arithmetic<T>::value, T> max(T a, T b) {
  return a < b || a != a ? b : a;
}
