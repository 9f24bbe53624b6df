// The calls that tests/cuda_lane.py recorded, again, without Python, for a build under AddressSanitizer and UBSan: each
// buffer is an allocation of just its size, and every call runs in all modes of the shim.
#include "../csrc/cuda/kernels.h"
#include "../csrc/cuda/ptx.cuh"

namespace {

struct Pointer {
  int64_t buffer, offset, target;  // where it is stored (-1: in the struct of the call), and the buffer it points to
};

int64_t read_number(FILE* file) {
  int64_t n;
  if (fread(&n, sizeof n, 1, file) != 1) abort();
  return n;
}
std::string read_bytes(FILE* file) {
  std::string bytes((size_t)read_number(file), 0);
  if (fread(&bytes[0], 1, bytes.size(), file) != bytes.size()) abort();
  return bytes;
}

const char* call(const std::string& name, const void* p) {
  using namespace zo::cuda;
  if (name == "zo_linear") return zo_linear(*(const ZoLinear*)p);
  if (name == "zo_dense_linear") return zo_dense_linear(*(const ZoDenseLinear*)p);
  if (name == "zo_update") return zo_update(*(const ZoUpdate*)p);
  if (name == "zo_perturb") return zo_perturb(*(const ZoPerturb*)p);
  if (name == "dequantize") return dequantize(*(const Dequantize*)p);
  return "no such op";
}

}  // namespace

int main(int count, char** files) {
  for (int i = 1; i < count; i++) {
    FILE* file = fopen(files[i], "rb");
    if (!file) abort();
    const std::string name = read_bytes(file), problem = read_bytes(file);
    std::vector<std::string> contents((size_t)read_number(file));
    std::vector<int64_t> shifts;  // of an address, modulo 16
    for (std::string& bytes : contents) shifts.push_back(read_number(file)), bytes = read_bytes(file);
    std::vector<Pointer> pointers((size_t)read_number(file));
    for (Pointer& p : pointers) p = {read_number(file), read_number(file), read_number(file)};
    fclose(file);
    for (int mode = 0; mode < 6; mode++) {
      shim::mode = {(shim::Order)(mode / 2), mode % 2 != 0};
      std::vector<char*> blocks;
      for (size_t b = 0; b < contents.size(); b++) {
        blocks.push_back((char*)malloc(contents[b].size() + shifts[b]));
        memcpy(blocks[b] + shifts[b], contents[b].data(), contents[b].size());
      }
      std::vector<int64_t> words(problem.size() / 8);  // an aligned place for the struct
      memcpy(words.data(), problem.data(), problem.size());
      for (const Pointer& p : pointers) {
        char* const target = blocks[p.target] + shifts[p.target];
        memcpy((p.buffer < 0 ? (char*)words.data() : blocks[p.buffer] + shifts[p.buffer]) + p.offset, &target, 8);
      }
      const char* message = call(name, words.data());
      for (char* block : blocks) free(block);
      if (message) return fprintf(stderr, "%s: %s\n", files[i], message), 1;
    }
  }
  printf("%d calls\n", count - 1);
}
