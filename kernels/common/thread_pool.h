#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dgf {

// Sleeping workers shared by every kernel of the process. Not OpenMP: torch brings an OpenMP runtime of its own, and a
// second one would spin on the cores that torch is about to use.
class ThreadPool {
 public:
  static ThreadPool& instance() {
    static ThreadPool* pool = create();
    return *pool;
  }

  // Runs work(0) .. work(count - 1), each exactly once, on at most `threads` threads including the caller's.
  void run(int64_t count, int threads, const std::function<void(int64_t)>& work) {
    // A second caller does not wait for the first one's workers.
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    if (threads <= 1 || count <= 1 || !owner.owns_lock()) {
      for (int64_t i = 0; i < count; ++i) work(i);
      return;
    }
    const int helpers = static_cast<int>(count < threads ? count - 1 : threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int id = static_cast<int>(workers_.size());
        workers_.emplace_back([this, id, seen = generation_] { serve(id, seen); });
        workers_.back().detach();
      }
      work_ = &work;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = helpers;
      active_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    work_ = nullptr;
  }

 private:
  static ThreadPool*& slot() {
    static ThreadPool* pool = nullptr;
    return pool;
  }

  static ThreadPool* create() {
    slot() = new ThreadPool();
    // Threads do not survive a fork: the child starts over with an empty pool in the same place.
    pthread_atfork(nullptr, nullptr, [] { new (slot()) ThreadPool(); });
    return slot();
  }

  void drain() {
    for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) (*work_)(i);
  }

  void serve(int id, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= helpers_) continue;
      lock.unlock();
      drain();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t)>* work_ = nullptr;
  int64_t count_ = 0;
  int helpers_ = 0;
  int active_ = 0;
  uint64_t generation_ = 0;
};

}  // namespace dgf
