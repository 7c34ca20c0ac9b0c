// Whether this process is a fork of the one that made an engine: its threads did not come along.
#pragma once

#include <cstdint>
#include <mutex>

namespace dgls {

// How many forks there were between the first engine and this process. One load.
uint64_t forks();

// Counts forks from now on, and holds `mutex` over each, so that a child never finds it taken by a
// thread that it does not have. Where a system has no forks this does nothing.
void watch_forks(std::mutex& mutex);

}  // namespace dgls
