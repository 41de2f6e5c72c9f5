#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace skimp {
namespace {

constexpr size_t SCRATCH_BYTES = size_t{4} << 20;  // touched lazily
constexpr size_t SHARED_BYTES = size_t{64} << 20;  // likewise
constexpr int SPINS = 200;    // with pause: a few microseconds, about one small op
constexpr int YIELDS = 400;   // then let neighbours run, still reacting within a microsecond or so
// Between programs of one request the host takes some hundred microseconds: a thread that sleeps by
// then is woken late.
constexpr int YIELDS_BETWEEN = 4000;

void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A counter that threads wait on: they spin, then yield, then sleep. Counting the sleepers spares
// the raiser a system call, which costs more than a small op (std::atomic's own notify makes one
// every time). Either the raiser sees the sleeper or the sleeper sees the new value, since both
// sides are sequentially consistent.
struct alignas(64) Flag {
  std::atomic<int32_t> value{0};
  std::atomic<int32_t> sleepers{0};

  int32_t now() const { return value.load(std::memory_order_acquire); }

  void raise() {
    value.fetch_add(1);
    if (sleepers.load() > 0) value.notify_all();
  }

  void wait_while(int32_t old, int yields = YIELDS) {
    for (int i = 0; i < SPINS; ++i) {
      if (now() != old) return;
      cpu_relax();
    }
    for (int i = 0; i < yields; ++i) {
      if (now() != old) return;
      sched_yield();
    }
    sleepers.fetch_add(1);
    while (value.load() == old) value.wait(old);
    sleepers.fetch_sub(1);
  }
};

struct Job {
  const void* const* ops = nullptr;
  const OpFn* fns = nullptr;
  int num_ops = 0;
  int threads = 0;
  StepInfo step{};
};

class Pool {
 public:
  void run(const Job& job) {
    std::lock_guard lock(mutex_);
    while (static_cast<int>(members_.size()) < job.threads) add_member();
    job_ = job;
    barrier_.size = job.threads;
    for (int i = 1; i < job.threads; ++i) {
      members_[i]->start.raise();
    }
    work(0);
  }

 private:
  struct alignas(64) Member {
    Flag start;
    void* scratch = std::aligned_alloc(64, SCRATCH_BYTES);
  };

  struct Barrier {
    alignas(64) std::atomic<int32_t> arrived{0};
    Flag phase;
    int size = 1;

    void wait() {
      if (size == 1) return;
      const int32_t before = phase.now();
      if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        arrived.store(0, std::memory_order_relaxed);
        phase.raise();
      } else {
        phase.wait_while(before);
      }
    }
  };

  void add_member() {
    members_.push_back(std::make_unique<Member>());
    Member* member = members_.back().get();
    if (!member->scratch) throw std::bad_alloc();
    const int tid = static_cast<int>(members_.size()) - 1;
    if (tid == 0) return;  // the calling thread
    std::thread([this, member, tid] {
      for (int32_t seen = 0;; ++seen) {
        member->start.wait_while(seen, YIELDS_BETWEEN);
        work(tid);
      }
    }).detach();
  }

  // job_ is safe to read: run() returns, and so can change it, only after every member has
  // arrived at the last barrier, and each has taken its copy before the first one.
  void work(int tid) {
    const Job job = job_;
    Team team{tid,
              job.threads,
              members_[tid]->scratch,
              SCRATCH_BYTES,
              [](void* barrier) { static_cast<Barrier*>(barrier)->wait(); },
              &barrier_,
              shared_,
              SHARED_BYTES};
    for (int i = 0; i < job.num_ops; ++i) {
      job.fns[i](job.ops[i], job.step, team);
      barrier_.wait();
    }
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Member>> members_;
  Barrier barrier_;
  Job job_;
  void* shared_ = std::aligned_alloc(64, SHARED_BYTES);
};

// Never destroyed: sleeping workers must not outlive it at exit. A forked child has no workers,
// so it starts with a pool of its own.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<int> num_threads{1};
std::once_flag fork_handler;

Pool& pool() {
  std::call_once(fork_handler, [] {
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_relaxed); });
  });
  Pool* current = the_pool.load(std::memory_order_acquire);
  if (!current) {
    auto* fresh = new Pool;
    if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

void set_threads(int threads) { num_threads = std::clamp(threads, 1, 1024); }

int get_threads() { return num_threads; }

void run_program(const void* const* ops, const OpFn* fns, int num_ops, const StepInfo& step,
                 int threads) {
  if (num_ops == 0) return;
  pool().run(Job{ops, fns, num_ops, threads > 0 ? std::min(threads, 1024) : get_threads(), step});
}

}  // namespace skimp
