// What tests/cuda_lane.py asks of the shim beside the kernels of csrc/cuda.
#include "cuda_shim.h"

extern "C" __attribute__((visibility("default"))) void set_mode(int order, bool early) {
  shim::mode = {(shim::Order)order, early};
}

// Shared memory of the launches since the last question; returns how many there were.
extern "C" __attribute__((visibility("default"))) int take_launches(int64_t* shared, int most) {
  const int count = (int)shim::launches.size();
  for (int i = 0; i < count && i < most; i++) shared[i] = (int64_t)shim::launches[i];
  shim::launches.clear();
  return count;
}
