// What the driver says of a kernel on a device, asked once per process.
//
// What: answers to questions that every plan needs: SMs of a device, blocks of a kernel that fit it at once, whether clusters of them
//   fit; and the limit of dynamic shared memory that was set last. A question costs the host 1 to 5 us, as much as a launch. Its answer
//   depends on the kernel, the shape of the launch and the device alone.
// Chosen when: always; device.cuh asks through it, so every launcher does.
// Synchronisation: one mutex. A question is asked outside of it, so two threads may ask the same one. The limit is raised inside: the
//   driver keeps the limit that was set last, and a lower one must not overtake a higher one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace sts {

// What is asked about. Not every question has every field: null, 0.
struct DriverQuestion {
  const void* kernel;
  int device;
  unsigned threads;  // per block
  size_t shared_bytes;
  unsigned cluster;  // blocks per cluster; 1: how many blocks fit at once
  bool operator==(const DriverQuestion& other) const {
    return kernel == other.kernel && device == other.device && threads == other.threads && shared_bytes == other.shared_bytes &&
           cluster == other.cluster;
  }
};

class PlanCache {
 public:
  // Never destroyed: a thread may still launch while the process ends.
  static PlanCache& of_process() {
    static PlanCache& cache = *new PlanCache;
    return cache;
  }

  // The answer to `question`. ask(answer) fills it in, and returns whether the driver knew; else the result is `unknown`, and the
  // question is asked again next time.
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

  // Calls set() where `bytes` is above the limit of `kernel`, `preset` at first. set() sets the limit to `bytes`, and returns an error
  // code; 0: it is set.
  template <class Set>
  auto raise_limit(const void* kernel, int device, size_t bytes, size_t preset, const Set& set) -> decltype(set()) {
    if (bytes <= preset) return {};
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
      const uint64_t parts[] = {uint64_t(question.device), question.threads, question.shared_bytes, question.cluster};
      for (const uint64_t part : parts) {
        hash = (hash ^ part) * 0x9e3779b97f4a7c15u;
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
