// What tests/cuda_lane.py asks of the shim beside the kernels of csrc/cuda.
#include "cuda_shim.h"

extern "C" __attribute__((visibility("default"))) void set_mode(int order, bool early) {
  shim::mode = {(shim::Order)order, early};
}
