// Forks on Windows: there are none.
#ifdef _WIN32
#include "fork.h"

namespace dgls {

uint64_t forks() {
  return 0;
}

void watch_forks(std::mutex&) {}

}  // namespace dgls
#endif
