// The pybind11 module zoact_kernels._C: raw pointers and sizes in, error strings out, no logic.
//
// Every function takes the name of an ISA and then the fields of its struct in kernels.h, flat and in order (calls.h);
// pointers are ints (0 = null), enums are ints (their values: `ENUMS`). zoact_kernels/_C.pyi names the arguments.
// Reading them with a cursor instead of 40 typed parameters keeps one definition of the order.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/calls.h"

namespace py = pybind11;

namespace {

py::tuple runnable() {
  py::list names;
  for (const zo::Isa& isa : zo::isas)
    if (isa.runs()) names.append(isa.name);
  return py::tuple(names);
}

const zo::Isa& find(const std::string& name) {
  for (const zo::Isa& isa : zo::isas) {
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

  const zo::Isa& isa() {
    PyObject* name = next();
    if (!PyUnicode_Check(name)) refuse();
    return find(py::cast<std::string>(py::handle(name)));
  }

  template <class... Fields>
  void into(Fields&... fields) {
    (read(fields), ...);
  }

  template <class Item>
  int64_t items(const Item*& field) {
    PyObject* sequence = next();
    if (!PyList_Check(sequence) && !PyTuple_Check(sequence)) refuse();
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(sequence);
    const auto list = std::make_shared<std::vector<Item>>(size);
    for (Py_ssize_t i = 0; i < size; ++i) convert(PySequence_Fast_GET_ITEM(sequence, i), (*list)[i]);
    lists_.push_back(list);
    field = size ? list->data() : nullptr;
    return size;
  }

  [[noreturn]] void fail(const char* message) const { throw std::runtime_error(message); }

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
  std::vector<std::shared_ptr<void>> lists_;
};

template <class Problem, const char* (*zo::Isa::*kernel)(const Problem&)>
void run(const py::args& args) {
  Arguments in(args);
  const zo::Isa& isa = in.isa();
  Problem p{};
  zo::read(in, p);
  in.done();
  const char* message;
  {
    py::gil_scoped_release release;
    message = (isa.*kernel)(p);
  }
  if (message) throw std::runtime_error(message);
}

void noise_run(const py::args& args) {
  Arguments in(args);
  const zo::Isa& isa = in.isa();
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
  m.def("zo_linear", &run<zo::ZoLinear, &zo::Isa::zo_linear>);
  m.def("zo_dense_linear", &run<zo::ZoDenseLinear, &zo::Isa::zo_dense_linear>);
  m.def("zo_update", &run<zo::ZoUpdate, &zo::Isa::zo_update>);
  m.def("zo_perturb", &run<zo::ZoPerturb, &zo::Isa::zo_perturb>);
  m.def("dequantize", &run<zo::Dequantize, &zo::Isa::dequantize>);
  m.def("noise_run", &noise_run);
}
