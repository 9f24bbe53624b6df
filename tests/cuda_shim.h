// What a CUDA kernel needs of its machine, on the CPU, for tests: csrc/cuda/ptx.cuh includes this where a host compiler
// reads it. Blocks run one after another; the threads of a block are fibers, each of which runs until it waits.
//
//   order     ascending and descending: a warp runs until it waits for the others; random (seeded): warps side by side.
//             Without a barrier that it needs, a kernel reads what is not there yet, or what is there no more, in at
//             least one of them
//   delivery  an asynchronous copy fills its destination with NaN, and the bytes arrive at the wait (late), or at once
//             (early): a missing wait, and a buffer refilled while it is being read, both give wrong numbers
//   shared    starts as NaN in every block, and bytes behind its end must stay as they were
//
// What cannot be right ends the launch with a message: a barrier that not all threads reach, a collective that a part
// of a warp calls, an address without the alignment that an instruction asks for, one in a page that nobody may touch.
// There is no memory model, no clock.
#pragma once
#include <signal.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum class Order { ascending = 0, descending = 1, random = 2 };
struct Mode {
  Order order = Order::ascending;
  bool early = false;
};
inline Mode mode;

constexpr int LANES = 32;
// AddressSanitizer has to know on which stack the program goes on, and needs larger ones.
#ifdef __SANITIZE_ADDRESS__
inline void start_switch(void** fake, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(fake, bottom, size);
}
inline void finish_switch(void* fake, const void** bottom, size_t* size) {
  __sanitizer_finish_switch_fiber(fake, bottom, size);
}
constexpr size_t STACK = 512 << 10;
#else
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
constexpr size_t STACK = 64 << 10;
#endif

constexpr size_t SLOT = 64, FENCE = 4096, MOST_SHARED = 227 << 10;
constexpr unsigned char NAN_BYTE = 0xff;  // of fp32, bf16 and fp16 alike

enum class State { ready, block_barrier, warp_barrier, done };

struct Copy {
  char* to;
  const char* from;
  int bytes;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  void* fake = nullptr;                   // of AddressSanitizer, while it waits
  State state;
  const char* collective;                 // what it waits in
  std::vector<std::vector<Copy>> groups;  // of copies, oldest first; the last one is open
  alignas(16) char slot[SLOT];            // what it shows to its warp
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const void* scheduler_stack;  // as AddressSanitizer tells
inline size_t scheduler_size;
inline Fiber* current;
inline std::string error;
inline std::vector<char> memory;  // shared, aligned by hand, and a fence behind it
inline size_t shared_bytes;
inline std::vector<size_t> launches;  // shared_bytes of each, until someone asks
inline const std::function<void()>* body;

inline char* shared_memory() { return (char*)(((uintptr_t)memory.data() + 127) / 128 * 128); }

inline void wait(State state, const char* what) {
  current->state = state, current->collective = what;
  start_switch(&current->fake, scheduler_stack, scheduler_size);
  swapcontext(&current->context, &scheduler);
  finish_switch(current->fake, &scheduler_stack, &scheduler_size);
}

// Back to the scheduler for good.
[[noreturn]] inline void leave() {
  start_switch(nullptr, scheduler_stack, scheduler_size);
  setcontext(&scheduler);
  abort();
}

// Ends the launch; called by a fiber, does not return.
[[noreturn]] inline void fail(const std::string& why) {
  error = "block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) +
          " thread " + std::to_string(threadIdx.x) + ": " + why;
  leave();
}

inline void aligned(const void* p, uintptr_t bytes, const char* what) {
  if ((uintptr_t)p % bytes) fail(std::string(what) + " of an address that is no multiple of " + std::to_string(bytes));
}

// Every lane of the warp shows `mine` and sees all of them.
template <class T>
void exchange(const char* what, const T& mine, T* all) {
  static_assert(sizeof(T) <= SLOT, "a slot holds it");
  memcpy(current->slot, &mine, sizeof(T));
  wait(State::warp_barrier, what);
  const size_t warp = threadIdx.x / LANES * LANES;
  for (int lane = 0; lane < LANES; lane++) memcpy(&all[lane], fibers[warp + lane].slot, sizeof(T));
  wait(State::warp_barrier, what);
}

inline void deliver(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
}
inline void async_copy16(void* to, const void* from, int bytes) {
  aligned(to, 16, "cp.async");
  aligned(from, 16, "cp.async");
  if (bytes < 0 || bytes > 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
  const char* begin = shared_memory();
  if ((char*)to < begin || (char*)to + 16 > begin + shared_bytes) fail("cp.async to outside of shared memory");
  const Copy copy = {(char*)to, (const char*)from, bytes};
  if (mode.early) return deliver(copy);
  memset(to, NAN_BYTE, 16);
  current->groups.back().push_back(copy);
}
inline void async_commit() { current->groups.emplace_back(); }
inline void async_wait(size_t pending) {
  while (current->groups.size() - 1 > pending) {
    for (const Copy& copy : current->groups.front()) deliver(copy);
    current->groups.erase(current->groups.begin());
  }
}

inline void enter() {
  finish_switch(nullptr, &scheduler_stack, &scheduler_size);
  (*body)();
  current->state = State::done;
  leave();
}

// Lets fibers `begin` .. `end` - 1 go on if all of them wait in `state`; true if they did.
inline bool release(size_t begin, size_t end, State state) {
  for (size_t i = begin; i < end; i++)
    if (fibers[i].state != state) return false;
  for (size_t i = begin; i < end; i++)
    if (strcmp(fibers[i].collective, fibers[begin].collective)) {
      error = std::string("a warp is at ") + fibers[begin].collective + " and at " + fibers[i].collective;
      return false;
    }
  for (size_t i = begin; i < end; i++) fibers[i].state = State::ready;
  return true;
}

// A fiber at the start of the kernel.
inline void prepare(Fiber& fiber) {
  fiber.state = State::ready;
  fiber.groups.assign(1, {});
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

// Runs what can run of the warp that begins at fiber `warp`; true if its lanes may go on at once, all past a barrier.
inline bool run_warp(size_t warp, const std::vector<size_t>& lanes, bool& progress) {
  for (const size_t lane : lanes) {
    current = &fibers[warp + lane];
    if (current->state != State::ready) continue;
    progress = true;
    threadIdx = dim3(warp + lane);
    void* fake = nullptr;
    start_switch(&fake, current->stack.data(), current->stack.size());
    swapcontext(&scheduler, &current->context);
    finish_switch(fake, nullptr, nullptr);
    if (!error.empty()) return false;
  }
  return release(warp, warp + LANES, State::warp_barrier);
}

inline void run_block(std::mt19937& random) {
  const size_t count = fibers.size();
  std::fill(memory.begin(), memory.end(), (char)NAN_BYTE);
  for (Fiber& fiber : fibers) prepare(fiber);
  std::vector<size_t> warps, lanes;
  for (size_t i = 0; i < count; i += LANES) warps.push_back(i);
  for (size_t i = 0; i < LANES; i++) lanes.push_back(i);
  if (mode.order == Order::descending) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  while (!std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::done; })) {
    bool progress = false;
    if (mode.order == Order::random) std::shuffle(warps.begin(), warps.end(), random);
    for (const size_t warp : warps) {
      if (mode.order == Order::random) {  // warps side by side; else one runs until it waits for the others
        std::shuffle(lanes.begin(), lanes.end(), random);
        run_warp(warp, lanes, progress);
      } else {
        while (run_warp(warp, lanes, progress)) continue;
      }
      if (!error.empty()) return;
    }
    progress |= release(0, count, State::block_barrier);
    if (!error.empty()) return;
    if (!progress) {
      error = "threads wait for one another: a barrier that not all of them reach";
      return;
    }
  }
  const char* end = shared_memory() + shared_bytes;
  if (!std::all_of(end, end + FENCE, [](char byte) { return (unsigned char)byte == NAN_BYTE; }))
    error = "a write behind the end of shared memory";
}

// A fiber touched a page that is none of its tensors' (tests/cuda_fence.py).
inline void outside(int) { fail("a read or a write outside of a tensor"); }

inline const char* launch(dim3 grid, int threads, size_t shared, const std::function<void()>& kernel) {
  static std::string message;
  error.clear();
  if (threads % LANES || threads < 1 || threads > 1024) error = "a block of " + std::to_string(threads) + " threads";
  if (shared > MOST_SHARED) error = std::to_string(shared) + " bytes of shared memory";
  if (grid.y > 65535 || grid.z > 65535) error = "a grid too large";
  fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(STACK);
  memory.resize(shared + FENCE + 128);
  launches.push_back(shared);
  shared_bytes = shared, body = &kernel, gridDim = grid, blockDim = dim3(threads);
  struct sigaction before, stop = {};
  stop.sa_handler = outside, stop.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &stop, &before);
  std::mt19937 random(0);
  for (unsigned z = 0; z < grid.z && error.empty(); z++)
    for (unsigned y = 0; y < grid.y && error.empty(); y++)
      for (unsigned x = 0; x < grid.x && error.empty(); x++) {
        blockIdx = dim3(x, y, z);
        run_block(random);
      }
  sigaction(SIGSEGV, &before, nullptr);
  message = error;
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::State::block_barrier, "__syncthreads"); }
inline void __syncwarp() { shim::wait(shim::State::warp_barrier, "__syncwarp"); }
