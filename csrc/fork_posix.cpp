// Forks on Linux and other POSIX systems.
#ifndef _WIN32
#include "fork.h"

#include <pthread.h>

#include <atomic>

namespace dgls {
namespace {

std::atomic<uint64_t> counted{0};
std::mutex* held = nullptr;

void before() {
  held->lock();
}

void in_parent() {
  held->unlock();
}

void in_child() {
  counted.fetch_add(1, std::memory_order_relaxed);
  held->unlock();
}

}  // namespace

uint64_t forks() {
  return counted.load(std::memory_order_relaxed);
}

void watch_forks(std::mutex& mutex) {
  held = &mutex;
  pthread_atfork(before, in_parent, in_child);
}

}  // namespace dgls
#endif
