#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace attlas {
namespace {

// Scratch memory of a thread; it stays with the thread, because fresh pages would be faulted in at every call.
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  char* get(size_t need) {
    if (need > size) {
      free(data);
      data = nullptr, size = 0;
      void* p = nullptr;
      if (posix_memalign(&p, 4096, need) != 0) return nullptr;
      data = static_cast<char*>(p), size = need;
    }
    return data;
  }
  ~Scratch() { free(data); }
};
thread_local Scratch scratch;

struct Job {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  int64_t tasks = 0;
  size_t scratch_bytes = 0;
  TaskFn fn = nullptr;
  const void* context = nullptr;

  void work() {
    char* memory = scratch.get(scratch_bytes + 64);
    if (!memory) {
      failed.store(true);
      return;
    }
    for (;;) {
      int64_t t = next.fetch_add(1, std::memory_order_relaxed);
      if (t >= tasks) return;
      fn(context, t, memory);
    }
  }
};

class Pool {
 public:
  void run(Job* job, int64_t helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int64_t>(workers_) < helpers) {
        try {
          std::thread(&Pool::loop, this, workers_).detach();
        } catch (...) {
          break;  // fewer threads than wished for
        }
        workers_++;
      }
      job_ = job;
      wanted_ = helpers < workers_ ? helpers : workers_;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job->work();
    {  // A helper that has not woken up by now has nothing left to do and is not waited for: on a busy machine that can take long.
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
    }
    for (int spins = 0; active_.load(std::memory_order_acquire) != 0; spins++)
      if (spins > 2000) std::this_thread::yield();
  }

 private:
  void loop(int64_t index) {
    uint64_t seen = 0;
    for (;;) {
      auto start = std::chrono::steady_clock::now();
      int spins = 0;
      while (generation_.load(std::memory_order_acquire) == seen) {
        __builtin_ia32_pause();
        if (++spins % 64 == 0 && std::chrono::steady_clock::now() - start > std::chrono::microseconds(100)) {
          std::unique_lock<std::mutex> lock(mutex_);
          wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        }
      }
      Job* job;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        seen = generation_.load(std::memory_order_relaxed);
        job = index < wanted_ ? job_ : nullptr;
        if (job) active_.fetch_add(1, std::memory_order_relaxed);
      }
      if (!job) continue;
      job->work();
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> active_{0};  // helpers inside the current job
  Job* job_ = nullptr;
  int64_t workers_ = 0, wanted_ = 0;
};

std::mutex owner;           // one parallel job at a time; other callers run their tasks alone
Pool* pool = nullptr;       // never destroyed: its threads live as long as the process

// torch's own team of threads, when its OpenMP runtime is known. A second team would compete with it: OpenMP threads go on spinning for
// milliseconds after their work, on the cores that ours would need.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> openmp{nullptr};
void work_in_team(void* job) { static_cast<Job*>(job)->work(); }

void after_fork_in_child() {  // the threads are gone; a fresh pool is started on the first call
  pool = nullptr;
  openmp.store(nullptr);  // OpenMP does not survive a fork
  new (&owner) std::mutex;
}
void survive_forks() {
  static const int done = pthread_atfork(nullptr, nullptr, after_fork_in_child);
  (void)done;
}

}  // namespace

void use_openmp(void* gomp_parallel) {
  survive_forks();
  openmp.store(reinterpret_cast<GompParallel>(gomp_parallel));
}

bool parallel_for(int64_t tasks, int64_t threads, size_t scratch_bytes, TaskFn fn, const void* context) {
  if (tasks <= 0) return true;
  Job job;
  job.tasks = tasks, job.scratch_bytes = scratch_bytes, job.fn = fn, job.context = context;
  int64_t helpers = (threads < tasks ? threads : tasks) - 1;
  GompParallel team = helpers > 0 ? openmp.load() : nullptr;
  if (team) {
    team(work_in_team, &job, static_cast<unsigned>(helpers + 1), 0);
  } else if (helpers > 0 && owner.try_lock()) {
    std::lock_guard<std::mutex> lock(owner, std::adopt_lock);
    survive_forks();
    if (!pool) pool = new Pool;
    pool->run(&job, helpers);
  } else {
    job.work();
  }
  return job.next.load() >= tasks;
}

}  // namespace attlas
