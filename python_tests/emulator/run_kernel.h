// Calls a launcher of the table on host arrays: on the GPU if compiled by nvcc, else in the emulator. Both front ends use it.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace kernel_table {

struct Given {
  enum Kind { kNull, kInteger, kReal, kArray } kind = kNull;
  int64_t integer = 0;
  double real = 0;
  void* data = nullptr;  // an array of `count` elements; the launcher gets the address of element `offset`
  size_t itemsize = 0, count = 0, offset = 0;
};

inline void check(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(error));
}

// One array in an allocation of exactly its size: memory checkers see accesses past both ends.
class DeviceArray {
 public:
  DeviceArray(const void* data, size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&memory_, bytes ? bytes : 1), "cudaMalloc");
    if (bytes) check(cudaMemcpy(memory_, data, bytes, cudaMemcpyHostToDevice), "copy to the device");
  }
  DeviceArray(DeviceArray&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)), bytes_(other.bytes_) {}
  ~DeviceArray() { cudaFree(memory_); }
  char* address() const { return static_cast<char*>(memory_); }
  void copy_back(void* data) const {
    if (bytes_) check(cudaMemcpy(data, memory_, bytes_, cudaMemcpyDeviceToHost), "copy from the device");
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_;
};

inline std::string expected(const Parameter& parameter) {
  switch (parameter.kind) {
    case Kind::kInteger:
      return "an integer";
    case Kind::kReal:
      return "a number";
    default:
      return "an array of " + std::to_string(parameter.itemsize) + "-byte elements, or null";
  }
}

inline bool fits(const Parameter& parameter, const Given& given) {
  switch (parameter.kind) {
    case Kind::kInteger:
      return given.kind == Given::kInteger;
    case Kind::kReal:
      return given.kind == Given::kReal || given.kind == Given::kInteger;
    default:
      return given.kind == Given::kNull ||
             (given.kind == Given::kArray && given.itemsize == parameter.itemsize && given.offset <= given.count);
  }
}

// Copies arrays that the launcher may write back to the host. Returns the answer of a query, 0 for a launch.
inline int64_t run_kernel(const std::string& name, const std::vector<Given>& given) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("no kernel is called " + name);
  const Kernel& kernel = found->second;
  if (given.size() != kernel.parameters.size())
    throw std::invalid_argument(name + " takes " + std::to_string(kernel.parameters.size()) + " arguments, got " +
                                std::to_string(given.size()));
  for (size_t i = 0; i < given.size(); ++i)
    if (!fits(kernel.parameters[i], given[i]))
      throw std::invalid_argument(name + ": argument " + std::to_string(i) + " must be " + expected(kernel.parameters[i]));

  static const cudaStream_t stream = [] {  // not the default stream: a launcher that ignores its stream fails
    cudaStream_t created;
    check(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking), "cudaStreamCreate");
    return created;
  }();
  std::vector<Value> values(given.size());
  std::vector<DeviceArray> arrays;
  arrays.reserve(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    values[i].integer = given[i].integer;
    values[i].real = given[i].kind == Given::kInteger ? static_cast<double>(given[i].integer) : given[i].real;
    if (given[i].kind != Given::kArray) continue;
    arrays.emplace_back(given[i].data, given[i].itemsize * given[i].count);
    values[i].array = arrays.back().address() + given[i].itemsize * given[i].offset;
  }
  const Result result = kernel.call(kernel.launcher, values.data(), stream);
  check(result.error, name.c_str());
  check(cudaStreamSynchronize(stream), name.c_str());
  size_t array = 0;
  for (size_t i = 0; i < given.size(); ++i) {
    if (given[i].kind != Given::kArray) continue;
    if (kernel.parameters[i].kind == Kind::kInOut) arrays[array].copy_back(given[i].data);
    ++array;
  }
  return result.answer;
}

}  // namespace kernel_table
