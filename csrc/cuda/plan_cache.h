// Cache of driver queries about kernels and devices, one per process.
//
// What: answers that every plan needs: SMs of a device, resident blocks of a kernel, resident clusters; and the limit of dynamic shared
//   memory that was set last. A query costs the host 1 to 5 us, as much as a launch. Its answer depends on the kernel, the launch shape and
//   the device alone.
// Chosen when: always; all launchers query the driver through device.cuh, which uses this cache.
// Synchronisation: one mutex. Queries run outside of it, so two threads may run the same one. The limit is raised inside: the driver keeps
//   the limit that was set last, and a lower limit must not overwrite a higher one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace sts {

// Key of a query. Fields that a query does not need are null or 0; a query of the device alone has a number of its own in shared_bytes.
struct DriverQuestion {
  const void* kernel;
  int device;
  unsigned threads;  // per block
  size_t shared_bytes;
  unsigned cluster;  // blocks per cluster; 1: the query is for resident blocks per SM
  bool operator==(const DriverQuestion& other) const {
    return kernel == other.kernel && device == other.device && threads == other.threads && shared_bytes == other.shared_bytes &&
           cluster == other.cluster;
  }
};

class PlanCache {
 public:
  // Never destroyed: a thread may still launch kernels while the process exits.
  static PlanCache& of_process() {
    static PlanCache& cache = *new PlanCache;
    return cache;
  }

  // The cached answer, or that of ask(answer), which queries the driver and returns whether it succeeded. On failure the result is
  // `unknown`, and nothing is cached.
  template <class Ask>
  int answer(const DriverQuestion& question, int unknown, const Ask& ask) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = answers_.find(question); found != answers_.end()) return found->second;
    }
    int answer = 0;
    if (!ask(answer)) return unknown;
    const std::lock_guard<std::mutex> lock(mutex_);
    return answers_.emplace(question, answer).first->second;
  }

  // Calls set() if `bytes` is above the limit of `kernel`, which is default_limit at first. set() raises the limit to `bytes` and returns
  // an error code, 0 for success.
  template <class Set>
  auto raise_limit(const void* kernel, int device, size_t bytes, size_t default_limit, const Set& set) -> decltype(set()) {
    if (bytes <= default_limit) return {};
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t& limit = limits_[DriverQuestion{kernel, device, 0, 0, 0}];
    if (bytes <= limit) return {};
    const auto error = set();
    if (error == decltype(set()){}) limit = bytes;
    return error;
  }

 private:
  struct Hash {
    size_t operator()(const DriverQuestion& question) const {
      uint64_t hash = reinterpret_cast<uintptr_t>(question.kernel);
      const uint64_t fields[] = {uint64_t(question.device), question.threads, question.shared_bytes, question.cluster};
      for (const uint64_t field : fields) {
        hash = (hash ^ field) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 32;
      }
      return static_cast<size_t>(hash);
    }
  };

  std::mutex mutex_;
  std::unordered_map<DriverQuestion, int, Hash> answers_;
  std::unordered_map<DriverQuestion, size_t, Hash> limits_;
};

}  // namespace sts
