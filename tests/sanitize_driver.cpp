// `make sanitize`: kernel calls that the tests dumped (tests/dump_calls.py), run again without Python, under
// AddressSanitizer and UndefinedBehaviorSanitizer, on every ISA of this CPU, with one thread and with two.
//
// Every buffer is an allocation of its own that ends where the tensor ended, so reading or writing one byte too many is
// an error; so is touching the padding between the rows of a strided matrix. What the ISAs compute is compared loosely:
// enough to see that they did the same work, while the tests proper judge the numbers.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/calls.h"

namespace {

std::string& running = *new std::string;  // what to name when a sanitizer stops the program, even as it exits

void name_it() { fprintf(stderr, "\nfound in %s\n", running.c_str()); }

[[noreturn]] void stop(const std::string& why) {
  fprintf(stderr, "%s: %s\n", running.c_str(), why.c_str());
  exit(1);
}

// ---------------------------------------------------------------- recorded calls

struct Argument {
  char tag = 'i';  // i: number, f: real, p: bytes of a pointer, l: list
  int64_t number = 0;
  double real = 0;
  std::vector<char> bytes;
  std::vector<Argument> items;
};

struct Call {
  std::string kernel, test;
  std::vector<Argument> arguments;
};

class File {
 public:
  explicit File(const char* path) : in_(path, std::ios::binary) {
    if (!in_) stop(std::string("cannot read ") + path);
  }
  bool at_end() { return in_.peek() == EOF; }

  Call call() {
    Call call;
    call.kernel = text<std::string>(), call.test = text<std::string>(), call.arguments = arguments();
    return call;
  }

 private:
  template <class T>
  T value() {
    T value{};
    if (!in_.read(reinterpret_cast<char*>(&value), sizeof value)) stop("the dump is cut short");
    return value;
  }
  template <class T>
  T text() {
    T text(value<int64_t>(), 0);
    if (!text.empty() && !in_.read(&text[0], text.size())) stop("the dump is cut short");
    return text;
  }
  std::vector<Argument> arguments() {
    std::vector<Argument> list(value<int64_t>());
    for (Argument& a : list) {
      a.tag = value<char>();
      if (a.tag == 'f') {
        a.real = value<double>();
      } else if (a.tag == 'l') {
        a.items = arguments();
      } else {
        a.number = value<int64_t>();  // of a pointer: its address modulo 64
        if (a.tag == 'p') a.bytes = text<std::vector<char>>();
      }
    }
    return list;
  }

  std::ifstream in_;
};

// ---------------------------------------------------------------- a call as a kernel takes it

// A copy of a tensor's bytes at the alignment it had; the allocation ends with it, what precedes it is poisoned.
class Buffer {
 public:
  explicit Buffer(const Argument& a) : size_(a.bytes.size()) {
    void* block;
    if (posix_memalign(&block, 64, a.number + size_)) stop("no memory");
    block_.reset(static_cast<char*>(block));
    data_ = block_.get() + a.number;
    if (size_) memcpy(data_, a.bytes.data(), size_);
    ASAN_POISON_MEMORY_REGION(block_.get(), a.number);
  }
  ~Buffer() { unpoison(); }
  void unpoison() { ASAN_UNPOISON_MEMORY_REGION(block_.get(), data_ + size_ - block_.get()); }
  char* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* block) const { free(block); }
  };
  std::unique_ptr<char, Free> block_;
  char* data_;
  int64_t size_;
};

// The Reader of calls.h.
class Arguments {
 public:
  Arguments(const std::vector<Argument>& values, int32_t threads) : values_(values), threads_(threads) {}

  template <class... Fields>
  void into(Fields&... fields) {
    (convert(next(), fields), ...);
  }
  template <class Item>
  int64_t items(const Item*& field) {
    const Argument& a = next();
    if (a.tag != 'l') fail("a list was expected");
    const auto list = std::make_shared<std::vector<Item>>(a.items.size());
    for (size_t i = 0; i < list->size(); i++) convert(a.items[i], (*list)[i]);
    lists_.push_back(list);
    field = list->empty() ? nullptr : list->data();
    return list->size();
  }
  [[noreturn]] void fail(const char* message) const { stop(message); }

  // The values of all buffers that the kernel writes.
  std::vector<float> outputs(zo::DType dtype) {
    for (const auto& buffer : buffers_) buffer->unpoison();
    std::vector<float> values;
    for (const Output& output : outputs_) {
      const zo::DType type = output.is_float ? zo::DType::f32 : dtype;
      const int64_t count = output.buffer->size() / (type == zo::DType::f32 ? 4 : 2);
      for (int64_t i = 0; i < count; i++) values.push_back(zo::load_scalar(type, output.buffer->data(), i));
    }
    return values;
  }

 private:
  struct Output {
    const Buffer* buffer;
    bool is_float;
  };

  const Argument& next() {
    if (index_ == values_.size()) {  // `threads` comes last in every struct, and is not recorded
      last_.number = threads_;
      if (index_++ == values_.size()) return last_;
    }
    if (index_ > values_.size()) fail("the dump has too few arguments");
    return values_[index_++];
  }

  template <class T>
  void convert(const Argument& a, T*& field) {
    field = nullptr;
    if (a.tag == 'i' && a.number == 0) return;
    if (a.tag != 'p') fail("a pointer was expected");
    buffers_.push_back(std::make_unique<Buffer>(a));
    field = reinterpret_cast<T*>(buffers_.back()->data());
    if constexpr (!std::is_const_v<T>) outputs_.push_back({buffers_.back().get(), std::is_same_v<T, float>});
  }
  void convert(const Argument& a, float& field) {
    if (a.tag != 'f') fail("a real number was expected");
    field = static_cast<float>(a.real);
  }
  template <class T>
  std::enable_if_t<std::is_integral_v<T> || std::is_enum_v<T>> convert(const Argument& a, T& field) {
    if (a.tag != 'i') fail("an integer was expected");
    field = static_cast<T>(a.number);
  }

  const std::vector<Argument>& values_;
  Argument last_;
  int32_t threads_;
  size_t index_ = 0;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::shared_ptr<void>> lists_;
  std::vector<Output> outputs_;
};

// ---------------------------------------------------------------- running it

// Poisons what lies between the rows of a matrix whose rows are `stride` elements apart.
void poison_gaps(const void* data, zo::DType dtype, int64_t rows, int64_t columns, int64_t stride) {
  const int64_t size = dtype == zo::DType::f32 ? 4 : 2;
  const char* const gap = static_cast<const char*>(data) + columns * size;
  for (int64_t m = 0; m + 1 < rows && stride > columns; m++)
    ASAN_POISON_MEMORY_REGION(gap + m * stride * size, (stride - columns) * size);
}
void poison_gaps(const zo::ZoLinear& p) { poison_gaps(p.x, p.dtype, p.M, p.w.K, p.x_stride); }
void poison_gaps(const zo::ZoDenseLinear& p) { poison_gaps(p.x, p.dtype, p.M, p.w.K, p.x_stride); }
void poison_gaps(const zo::ZoPerturb& p) { poison_gaps(p.w, p.dtype, p.N, p.C, p.w_stride); }
void poison_gaps(const zo::ZoUpdate&) {}
void poison_gaps(const zo::Dequantize&) {}

zo::DType dtype_of(const zo::ZoUpdate&) { return zo::DType::f32; }
template <class Problem>
zo::DType dtype_of(const Problem& p) { return p.dtype; }

bool alike(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0;
  for (const float value : a)
    if (std::isfinite(value)) largest = std::fmax(largest, std::fabs(value));
  for (size_t i = 0; i < a.size(); i++)
    if (std::isfinite(a[i]) != std::isfinite(b[i]) || std::fabs(a[i] - b[i]) > 0.02f * largest) return false;
  return true;
}

std::map<std::string, std::map<std::string, int>> counts;  // kernel -> ISA -> calls

template <class Problem>
void run(const Call& call, const char* (*zo::Isa::*kernel)(const Problem&)) {
  std::vector<float> first;
  for (const zo::Isa& isa : zo::isas) {
    if (!isa.runs()) continue;
    for (const int threads : {1, 2}) {
      running = call.kernel + " on " + isa.name + ", threads = " + std::to_string(threads) + ", of " + call.test;
      Arguments in(call.arguments, threads);
      Problem p{};
      zo::read(in, p);
      poison_gaps(p);
      (isa.*kernel)(p);  // a refusal, too, is a call without errors
      const std::vector<float> values = in.outputs(dtype_of(p));
      if (threads == 1 && first.empty()) first = values;
      if (!alike(first, values)) stop("the result is not that of the first ISA");
    }
    counts[call.kernel][isa.name]++;
  }
}

// noise_run takes no tensors: every length and alignment up to a few vectors.
void run_noise() {
  for (const zo::Isa& isa : zo::isas) {
    if (!isa.runs()) continue;
    running = std::string("noise_run on ") + isa.name;
    for (const zo::Noise kind : {zo::Noise::normal, zo::Noise::rademacher})
      for (uint64_t first : {0ull, 1ull, 2ull, 3ull, ~0ull - 100})
        for (int64_t count = 0; count < 100; count++, counts["noise_run"][isa.name]++)
          isa.noise_run(std::make_unique<float[]>(count).get(), INT64_MIN, ~0u, kind, first, count);
  }
}

}  // namespace

// Options and callbacks by which the sanitizers find them; GCC has a runtime for each of the two.
extern "C" {
__attribute__((visibility("default"))) const char* __ubsan_default_options() { return "print_stacktrace=1"; }
__attribute__((visibility("default"))) void __ubsan_on_report() { name_it(); }
}

int main(int argc, char** argv) {
  __sanitizer_set_death_callback(name_it);
  for (int i = 1; i < argc; i++) {
    running = argv[i];
    for (File file(argv[i]); !file.at_end();) {
      const Call call = file.call();
      if (call.kernel == "zo_linear") run(call, &zo::Isa::zo_linear);
      else if (call.kernel == "zo_dense_linear") run(call, &zo::Isa::zo_dense_linear);
      else if (call.kernel == "zo_update") run(call, &zo::Isa::zo_update);
      else if (call.kernel == "zo_perturb") run(call, &zo::Isa::zo_perturb);
      else if (call.kernel == "dequantize") run(call, &zo::Isa::dequantize);
      else stop("there is no kernel " + call.kernel);
    }
  }
  run_noise();
  running = "a call that ran to its end";  // leaks are looked for after main
  printf("calls without an error, each with 1 and 2 threads:\n");
  for (const auto& [kernel, isas] : counts) {
    printf("  %-16s", kernel.c_str());
    for (const auto& [isa, count] : isas) printf("  %s %d", isa.c_str(), count);
    printf("\n");
  }
}
