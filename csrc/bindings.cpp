// The pybind11 module zoact_kernels._C: raw pointers and sizes in, error strings out, no logic.
//
// Every function takes the name of an ISA and then the fields of its struct in kernels.h, flat and in order; pointers
// are ints (0 = null), enums are ints (their values: `ENUMS`). zoact_kernels/_C.pyi names the arguments. Reading them
// with a cursor instead of 40 typed parameters keeps one definition of the order: the struct.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

struct Isa {
  const char* name;
  bool (*runs)();  // on this CPU and its operating system
  decltype(&zo_base::zo_linear) zo_linear;
  decltype(&zo_base::zo_dense_linear) zo_dense_linear;
  decltype(&zo_base::zo_update) zo_update;
  decltype(&zo_base::zo_perturb) zo_perturb;
  decltype(&zo_base::dequantize) dequantize;
  decltype(&zo_base::noise_run) noise_run;
};

#define ZO_KERNELS(isa)                                                                      \
  zo_##isa::zo_linear, zo_##isa::zo_dense_linear, zo_##isa::zo_update, zo_##isa::zo_perturb, \
      zo_##isa::dequantize, zo_##isa::noise_run

[[maybe_unused]] bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

// What was compiled, best first; setup.py defines ZO_HAS_<ISA> for each instruction set its compiler knows.
const Isa kIsas[] = {
#ifdef ZO_HAS_AVX512VNNI
    {"avx512vnni", [] { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }, ZO_KERNELS(avx512vnni)},
#endif
#ifdef ZO_HAS_AVX512
    {"avx512", runs_avx512, ZO_KERNELS(avx512)},
#endif
#ifdef ZO_HAS_AVX2
    // F16C came with the generation before AVX2, and Clang 14 cannot ask for it by name.
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, ZO_KERNELS(avx2)},
#endif
    {"base", [] { return true; }, ZO_KERNELS(base)},
};

py::tuple runnable() {
  py::list names;
  for (const Isa& isa : kIsas)
    if (isa.runs()) names.append(isa.name);
  return py::tuple(names);
}

const Isa& find(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name != isa.name) continue;
    static const py::tuple* names = new py::tuple(runnable());  // asked once; never freed, like the module
    if (names->contains(name)) return isa;
    throw std::runtime_error("isa is \"" + name + "\", which this CPU cannot run; it runs " +
                             std::string(py::str(*names)));
  }
  throw std::runtime_error("isa is \"" + name + "\", which is not compiled in; this CPU runs " +
                           std::string(py::str(runnable())));
}

// Reads the positional arguments of a call one by one into the fields they belong to.
class Arguments {
 public:
  explicit Arguments(const py::args& values) : values_(values.ptr()), count_(PyTuple_GET_SIZE(values.ptr())) {}

  const Isa& isa() {
    PyObject* name = next();
    if (!PyUnicode_Check(name)) refuse();
    return find(py::cast<std::string>(py::handle(name)));
  }

  template <class... Fields>
  void into(Fields&... fields) {
    (read(fields), ...);
  }

  // Sequence of pointers or integers; null for an empty one where the struct says so.
  template <class Item>
  std::vector<Item> items() {
    PyObject* sequence = next();
    if (!PyList_Check(sequence) && !PyTuple_Check(sequence)) refuse();
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(sequence);
    std::vector<Item> out(size);
    for (Py_ssize_t i = 0; i < size; ++i) convert(PySequence_Fast_GET_ITEM(sequence, i), out[i]);
    return out;
  }

  void done() const {
    if (index_ != count_) wrong_count();
  }

 private:
  PyObject* next() {
    if (index_ == count_) wrong_count();
    return PyTuple_GET_ITEM(values_, index_++);
  }

  template <class Field>
  void read(Field& field) {
    convert(next(), field);
  }

  template <class T>
  void convert(PyObject* value, T*& field) {
    const unsigned long long address = PyLong_Check(value) ? PyLong_AsUnsignedLongLong(value) : bad();
    if (address == bad() && (PyErr_Occurred() || !PyLong_Check(value))) refuse();
    field = reinterpret_cast<T*>(static_cast<uintptr_t>(address));
  }

  template <class T>
  std::enable_if_t<std::is_integral_v<T> || std::is_enum_v<T>> convert(PyObject* value, T& field) {
    int64_t number;
    if constexpr (std::is_same_v<T, uint64_t>) {
      number = static_cast<int64_t>(PyLong_Check(value) ? PyLong_AsUnsignedLongLong(value) : bad());
    } else {
      number = PyLong_Check(value) ? PyLong_AsLongLong(value) : -1;
    }
    if (number == -1 && (PyErr_Occurred() || !PyLong_Check(value))) refuse();
    field = static_cast<T>(number);
    if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>)
      if (static_cast<int64_t>(field) != number) refuse();
  }

  void convert(PyObject* value, float& field) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) refuse();
    field = static_cast<float>(number);
  }

  static constexpr unsigned long long bad() { return ~0ull; }

  [[noreturn]] void refuse() const {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "argument %zd is %R, which does not fit (see zoact_kernels/_C.pyi)", index_ - 1,
                 PyTuple_GET_ITEM(values_, index_ - 1));
    throw py::error_already_set();
  }

  [[noreturn]] void wrong_count() const {
    PyErr_Format(PyExc_TypeError, "got %zd arguments, which is too %s (see zoact_kernels/_C.pyi)", count_,
                 index_ == count_ ? "few" : "many");
    throw py::error_already_set();
  }

  PyObject* values_;
  Py_ssize_t count_, index_ = 0;
};

void read(Arguments& in, zo::Weight& w) {
  in.into(w.codes, w.scale, w.offset, w.nested, w.format, w.layout, w.code_dtype, w.scale_dtype, w.N, w.K, w.group_size,
          w.flat);
}

void read(Arguments& in, zo::Direction& z) {
  in.into(z.seeds, z.sigmas, z.S, z.G, z.noise, z.param_id, z.row_offset, z.cols);
}

template <class Problem>
void run(const char* (*kernel)(const Problem&), const Problem& problem) {
  const char* message;
  {
    py::gil_scoped_release release;
    message = kernel(problem);
  }
  if (message) throw std::runtime_error(message);
}

void zo_linear(const py::args& args) {
  Arguments in(args);
  const Isa& isa = in.isa();
  zo::ZoLinear p{};
  in.into(p.x, p.y, p.dtype, p.M, p.x_stride);
  read(in, p.w);
  in.into(p.bias, p.bias_dtype, p.base_basis, p.base_coeff, p.base_rank, p.basis, p.basis_per_group, p.coeff,
          p.coeff_groups, p.projected, p.R);
  read(in, p.z);
  in.into(p.G, p.threads);
  in.done();
  run(isa.zo_linear, p);
}

void zo_dense_linear(const py::args& args) {
  Arguments in(args);
  const Isa& isa = in.isa();
  zo::ZoDenseLinear p{};
  in.into(p.x, p.y, p.dtype, p.M, p.x_stride);
  read(in, p.w);
  in.into(p.bias, p.bias_dtype);
  read(in, p.z);
  in.into(p.on_scale, p.mask, p.mask_value, p.mask_seed, p.noise_scale, p.G, p.threads);
  in.done();
  run(isa.zo_dense_linear, p);
}

void zo_update(const py::args& args) {
  Arguments in(args);
  const Isa& isa = in.isa();
  zo::ZoUpdate p{};
  const auto coeffs = in.items<float*>(), exp_avgs = in.items<float*>(), exp_avg_sqs = in.items<float*>();
  const auto rows = in.items<int64_t>(), cols = in.items<int64_t>(), row_offsets = in.items<int64_t>();
  const auto fits = [&](size_t size, bool may_be_empty) { return size == coeffs.size() || (may_be_empty && !size); };
  if (!fits(exp_avgs.size(), true) || !fits(exp_avg_sqs.size(), true) || !fits(rows.size(), false) ||
      !fits(cols.size(), false) || !fits(row_offsets.size(), false))
    throw std::runtime_error("coeffs, exp_avgs, exp_avg_sqs, rows, cols, row_offsets must have one item per layer");
  p.layers = static_cast<int64_t>(coeffs.size());
  p.coeffs = coeffs.data();
  p.exp_avgs = exp_avgs.empty() ? nullptr : exp_avgs.data();
  p.exp_avg_sqs = exp_avg_sqs.empty() ? nullptr : exp_avg_sqs.data();
  p.rows = rows.data();
  p.cols = cols.data();
  p.row_offsets = row_offsets.data();
  in.into(p.param_ids, p.seeds, p.weights, p.S, p.weights_per_layer, p.noise, p.rule, p.hyper, p.threads);
  in.done();
  run(isa.zo_update, p);
}

void zo_perturb(const py::args& args) {
  Arguments in(args);
  const Isa& isa = in.isa();
  zo::ZoPerturb p{};
  in.into(p.w, p.dtype, p.N, p.C, p.w_stride, p.seeds, p.weights, p.S, p.noise, p.param_id, p.row_offset, p.cols,
          p.basis, p.R, p.mask, p.mask_value, p.mask_seed, p.noise_scale, p.has_rounding, p.rounding_seed, p.threads);
  in.done();
  run(isa.zo_perturb, p);
}

void dequantize(const py::args& args) {
  Arguments in(args);
  const Isa& isa = in.isa();
  zo::Dequantize p{};
  read(in, p.w);
  in.into(p.row_start, p.rows, p.out, p.dtype, p.threads);
  in.done();
  run(isa.dequantize, p);
}

void noise_run(const py::args& args) {
  Arguments in(args);
  const Isa& isa = in.isa();
  float* out;
  int64_t seed, count;
  uint32_t param_id;
  zo::Noise kind;
  uint64_t first;
  in.into(out, seed, param_id, kind, first, count);
  in.done();
  py::gil_scoped_release release;
  isa.noise_run(out, seed, param_id, kind, first, count);
}

// The integers of kernels.h by name, so that Python holds no second copy of them.
py::dict enums() {
  using namespace pybind11::literals;
  using zo::DType, zo::Format, zo::Layout, zo::Mask, zo::Noise, zo::Rule;
  const auto n = [](auto value) { return static_cast<int>(value); };
  return py::dict(
      "DType"_a = py::dict("f32"_a = n(DType::f32), "bf16"_a = n(DType::bf16), "f16"_a = n(DType::f16),
                           "u8"_a = n(DType::u8), "i8"_a = n(DType::i8), "i64"_a = n(DType::i64)),
      "Format"_a = py::dict("dense"_a = n(Format::dense), "int8"_a = n(Format::int8), "int4"_a = n(Format::int4),
                            "nf4"_a = n(Format::nf4), "fp4"_a = n(Format::fp4)),
      "Layout"_a = py::dict("row"_a = n(Layout::row), "cpu"_a = n(Layout::cpu)),
      "Noise"_a = py::dict("none"_a = n(Noise::none), "normal"_a = n(Noise::normal),
                           "rademacher"_a = n(Noise::rademacher)),
      "Mask"_a = py::dict("none"_a = n(Mask::none), "magnitude"_a = n(Mask::magnitude), "random"_a = n(Mask::random)),
      "Rule"_a = py::dict("sgd"_a = n(Rule::sgd), "momentum"_a = n(Rule::momentum), "adam"_a = n(Rule::adam),
                          "adamw"_a = n(Rule::adamw)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of zoact_kernels; arguments are named in zoact_kernels/_C.pyi.";
  m.attr("ENUMS") = enums();
  m.def("isas", &runnable, "Instruction sets this CPU can run, best first.");
  m.def("zo_linear", &zo_linear);
  m.def("zo_dense_linear", &zo_dense_linear);
  m.def("zo_update", &zo_update);
  m.def("zo_perturb", &zo_perturb);
  m.def("dequantize", &dequantize);
  m.def("noise_run", &noise_run);
}
