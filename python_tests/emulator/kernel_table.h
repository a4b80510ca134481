// Table of the launchers that tests call by name. STS_KERNEL(name, launcher), in a file of launchers/, adds one. Its signature determines
// how arguments are passed:
//   const T*                      an array that is read (null: absent); void counts as bytes
//   T*                            an array that is written, in place (null: absent)
//   bool, integer, float, double
//   cudaStream_t                  last, if at all; supplied by the front end
// A launcher returns cudaError_t. A function that returns an integer is a query to the host code, such as a field of a plan.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "scratch.h"

namespace kernel_table {

enum class Kind { kInput, kInOut, kInteger, kReal };

struct Parameter {
  Kind kind;
  size_t itemsize;  // of an array's elements
};

struct Value {
  void* array = nullptr;
  int64_t integer = 0;
  double real = 0;
};

struct Result {
  cudaError_t error = cudaSuccess;
  int64_t answer = 0;
};

struct Kernel {
  std::vector<Parameter> parameters;
  bool launches;       // else it answers a query
  void (*launcher)();  // type-erased; `call` restores its type
  Result (*call)(void (*launcher)(), const Value* values, cudaStream_t stream);
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> table;
  return table;
}

template <class P>
struct Argument {
  static_assert(std::is_arithmetic_v<P>, "a launcher takes pointers, numbers and, last, a stream");
  static constexpr Parameter parameter{std::is_floating_point_v<P> ? Kind::kReal : Kind::kInteger, 0};
  static P of(const Value& value) {
    if constexpr (std::is_floating_point_v<P>)
      return static_cast<P>(value.real);
    else
      return static_cast<P>(value.integer);
  }
};
template <class T>
struct Argument<T*> {
  static constexpr size_t itemsize() {
    if constexpr (std::is_void_v<T>)
      return 1;
    else
      return sizeof(T);
  }
  static constexpr Parameter parameter{std::is_const_v<T> ? Kind::kInput : Kind::kInOut, itemsize()};
  static T* of(const Value& value) { return static_cast<T*>(value.array); }
};

template <class... P>
constexpr bool ends_with_stream() {
  if constexpr (sizeof...(P) == 0)
    return false;
  else
    return std::is_same_v<std::tuple_element_t<sizeof...(P) - 1, std::tuple<P...>>, cudaStream_t>;
}

template <class R, class... P, size_t... I>
bool add(const char* name, R (*launcher)(P...), std::index_sequence<I...>) {
  using All = std::tuple<P...>;
  using Launcher = R (*)(P...);
  const auto call = [](void (*erased)(), const Value* values, [[maybe_unused]] cudaStream_t stream) -> Result {
    const auto typed = reinterpret_cast<Launcher>(erased);
    R result;
    if constexpr (ends_with_stream<P...>())
      result = typed(Argument<std::tuple_element_t<I, All>>::of(values[I])..., stream);
    else
      result = typed(Argument<std::tuple_element_t<I, All>>::of(values[I])...);
    if constexpr (std::is_same_v<R, cudaError_t>)
      return {result, 0};
    else
      return {cudaSuccess, static_cast<int64_t>(result)};
  };
  const Kernel kernel{
      {Argument<std::tuple_element_t<I, All>>::parameter...}, std::is_same_v<R, cudaError_t>, reinterpret_cast<void (*)()>(launcher), call};
  if (!kernels().emplace(name, kernel).second) throw std::logic_error(std::string("two kernels are called ") + name);
  return true;
}

template <class R, class... P>
bool add(const char* name, R (*launcher)(P...)) {
  return add(name, launcher, std::make_index_sequence<sizeof...(P) - ends_with_stream<P...>()>());
}

// The byte that fills scratch memory, on a GPU too: STS_EMULATE_FILL, by default all ones, which is NaN.
inline int fill() {
  const char* byte = std::getenv("STS_EMULATE_FILL");
  return byte && *byte ? std::atoi(byte) : 0xff;
}

// Scratch memory of a launcher under test (scratch.h), freed with this object. Each array is an allocation of its own, filled with fill().
// All arrays together must fit in the bytes that the op would allocate.
class Scratch {
 public:
  template <class Layout>
  Scratch(cudaStream_t stream, const Layout& layout) : stream_(stream), left_(sts::scratch_bytes(layout)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (void* part : parts_) cudaFree(part);
  }
  void* operator()(int64_t bytes) {
    left_ -= sts::scratch_array_bytes(bytes);
    if (left_ < 0) throw std::logic_error("the scratch arrays need more bytes than were measured");
    void* part = nullptr;
    if (cudaMalloc(&part, bytes) != cudaSuccess) return nullptr;
    parts_.push_back(part);
    return cudaMemsetAsync(part, fill(), bytes, stream_) == cudaSuccess ? part : nullptr;
  }

 private:
  cudaStream_t stream_;
  int64_t left_;  // bytes
  std::vector<void*> parts_;
};

}  // namespace kernel_table

#define STS_KERNEL(name, ...) [[maybe_unused]] static const bool kernel_##name = ::kernel_table::add(#name, __VA_ARGS__)
