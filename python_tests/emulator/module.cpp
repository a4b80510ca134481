// Python module sts_kernels_emulated: the CUDA kernels on the CPU, over NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ptx.cuh"
#include "run_kernel.h"

// Counters of the emulator itself. phases_begun: mbarrier phases that blocks have begun; tests count a kernel's exchanges by it.
// barriers_passed: __syncthreads that blocks have passed. driver_questions: driver queries about kernels and devices.
static int64_t phases_begun() { return emulator::phases_begun; }
static int64_t barriers_passed() { return emulator::barriers_passed; }
static int64_t driver_questions() { return emulator::questions; }
STS_KERNEL(phases_begun, phases_begun);
STS_KERNEL(barriers_passed, barriers_passed);
STS_KERNEL(driver_questions, driver_questions);

namespace py = pybind11;
using kernel_table::Given;
using kernel_table::Kind;

static Given given_array(const py::array& array, size_t offset, bool written, const std::string& what) {
  if (!(array.flags() & py::array::c_style)) throw py::value_error(what + " must be a contiguous array");
  if (written && !array.writeable()) throw py::value_error(what + " must be a writeable array");
  Given given;
  given.kind = Given::kArray;
  given.data = const_cast<void*>(array.data());
  given.itemsize = static_cast<size_t>(array.itemsize());
  given.count = static_cast<size_t>(array.size());
  given.offset = offset;
  return given;
}

static py::object run(const std::string& name, const py::args& args) {
  const auto found = kernel_table::kernels().find(name);
  std::vector<Given> given;
  for (size_t i = 0; i < args.size(); ++i) {
    const py::handle arg = args[i];
    const bool written =
        found != kernel_table::kernels().end() && i < found->second.parameters.size() && found->second.parameters[i].kind == Kind::kInOut;
    const std::string what = name + ": argument " + std::to_string(i);
    Given value;
    if (arg.is_none()) {
    } else if (py::isinstance<py::array>(arg)) {
      value = given_array(py::reinterpret_borrow<py::array>(arg), 0, written, what);
    } else if (py::isinstance<py::tuple>(arg)) {
      const auto pair = py::cast<std::pair<py::array, size_t>>(arg);
      value = given_array(pair.first, pair.second, written, what);
    } else if (py::isinstance<py::float_>(arg)) {
      value.kind = Given::kReal;
      value.real = py::cast<double>(arg);
    } else {
      value.kind = Given::kInteger;
      value.integer = py::cast<int64_t>(arg);
    }
    given.push_back(value);
  }
  int64_t answer;
  {
    const py::gil_scoped_release released;
    answer = kernel_table::run_kernel(name, given);
  }
  return found->second.launches ? py::none().cast<py::object>() : py::int_(answer);
}

PYBIND11_MODULE(sts_kernels_emulated, module) {
  module.doc() = "The CUDA kernels of sts_kernels on the CPU, over NumPy arrays; for tests.";
  module.def("run", &run,
             "run(name, *args): calls a launcher without its stream. An array argument is a contiguous NumPy array (bfloat16 and\n"
             "float16 as 2-byte elements of any dtype), None, or (array, offset) for the address of element `offset`; arrays that\n"
             "the launcher may write are changed in place. RuntimeError: the launcher failed, or the kernel did what it may not.");
  module.def("kernels", [] {
    std::vector<std::string> names;
    for (const auto& entry : kernel_table::kernels()) names.push_back(entry.first);
    return names;
  });
}
