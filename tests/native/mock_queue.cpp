// When the mock CUDA runtime runs what was launched.
#include <utility>

#include "mock_state.h"

namespace mock {
namespace {

// Counts a launch as finished, however it ends.
class Finish {
 public:
  explicit Finish(uint64_t number) : number_(number) {}
  ~Finish() {
    const std::lock_guard<std::mutex> lock(state().books);
    if (state().finished < number_) state().finished = number_;
  }
  Finish(const Finish&) = delete;
  Finish& operator=(const Finish&) = delete;

 private:
  const uint64_t number_;
};

}  // namespace

// An event follows its thread's launches: other threads have streams of their own.
thread_local uint64_t last_launch = 0;

uint64_t submit(std::function<void()> work) {
  uint64_t number = 0;
  {
    const std::lock_guard<std::mutex> lock(state().books);
    number = last_launch = ++state().launched;
    if (state().deferred) {
      state().queue.push_back([number, work = std::move(work)] {
        const Finish finish(number);
        work();
      });
      return number;
    }
  }
  const std::lock_guard<std::recursive_mutex> lock(state().device);
  const Finish finish(number);
  work();
  return number;
}

void run_queue(uint64_t until) {
  {
    // Not to wait, with Python's lock, for a launch that calls Python.
    const std::lock_guard<std::mutex> lock(state().books);
    if (state().finished >= until || state().queue.empty()) return;
  }
  const std::lock_guard<std::recursive_mutex> device(state().device);
  while (true) {
    std::function<void()> work;
    {
      const std::lock_guard<std::mutex> lock(state().books);
      if (state().finished >= until || state().queue.empty()) return;
      work = std::move(state().queue.front());
      state().queue.pop_front();
    }
    work();
  }
}

}  // namespace mock
