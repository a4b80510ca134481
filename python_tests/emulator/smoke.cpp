// Runs launchers of the table on arguments from a file, without Python or torch. Compiled by nvcc it is for compute-sanitizer and ncu, and
// emulated for the compiler's sanitizers. smoke.py writes the file and checks the output.
//
//   smoke CALLS OUTPUT
//
// CALLS: "STSCALLS", u64 number of calls; a call is a string (u64 length, bytes), u64 number of arguments, and arguments,
// each a u64 tag and: 0 null; 1 i64; 2 f64; 3 array: u64 itemsize, u64 count, u64 offset, the bytes.
// OUTPUT: for each call an i64 answer (0 for a launch) and the bytes of all its arrays.
// All numbers are in the byte order of the machine.
#include <cstdio>
#include <fstream>
#include <iostream>

#include "run_kernel.h"

using kernel_table::Given;

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    if (text(8) != "STSCALLS") throw std::runtime_error(std::string(path) + " is not a file of calls");
  }
  template <class T>
  T number() {
    T value;
    bytes(&value, sizeof value);
    return value;
  }
  std::string text(size_t length) {
    std::string value(length, '\0');
    bytes(value.data(), length);
    return value;
  }

 private:
  void bytes(void* to, size_t count) {
    if (!file_.read(static_cast<char*>(to), static_cast<std::streamsize>(count)))
      throw std::runtime_error("the file of calls is cut short");
  }
  std::ifstream file_;
};

static void run_all(const char* calls_path, const char* output_path) {
  Reader reader(calls_path);
  std::ofstream output(output_path, std::ios::binary);
  const auto calls = reader.number<uint64_t>();
  for (uint64_t call = 0; call < calls; ++call) {
    const std::string name = reader.text(reader.number<uint64_t>());
    std::vector<Given> given(reader.number<uint64_t>());
    std::vector<std::string> storage(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      Given& value = given[i];
      value.kind = static_cast<Given::Kind>(reader.number<uint64_t>());
      if (value.kind == Given::kInteger) value.integer = reader.number<int64_t>();
      if (value.kind == Given::kReal) value.real = reader.number<double>();
      if (value.kind != Given::kArray) continue;
      value.itemsize = reader.number<uint64_t>();
      value.count = reader.number<uint64_t>();
      value.offset = reader.number<uint64_t>();
      storage[i] = reader.text(value.itemsize * value.count);
      value.data = storage[i].data();
    }
    std::printf("call %llu: %s\n", static_cast<unsigned long long>(call), name.c_str());
    std::fflush(stdout);
    const int64_t answer = kernel_table::run_kernel(name, given);
    output.write(reinterpret_cast<const char*>(&answer), sizeof answer);
    for (const std::string& array : storage) output.write(array.data(), static_cast<std::streamsize>(array.size()));
  }
  if (!output.flush()) throw std::runtime_error(std::string("cannot write ") + output_path);
}

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s CALLS OUTPUT\nkernels:\n", arguments[0]);
    for (const auto& entry : kernel_table::kernels()) std::fprintf(stderr, "  %s\n", entry.first.c_str());
    return 2;
  }
  try {
    run_all(arguments[1], arguments[2]);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
