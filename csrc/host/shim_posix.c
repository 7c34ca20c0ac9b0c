/* The shim on Linux and other POSIX systems. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Linux reads at most this many bytes in one call (read(2), "On Linux, read() will transfer at
 * most 0x7ffff000 bytes"). */
static const uint64_t max_read_bytes = 0x7ffff000;

uint64_t dgls_host_page_bytes(void) {
  long bytes = sysconf(_SC_PAGESIZE);
  return bytes > 0 ? (uint64_t)bytes : 4096;
}

int32_t dgls_host_lock(uint64_t address, uint64_t bytes) {
  return mlock((const void*)(uintptr_t)address, (size_t)bytes) == 0 ? 0 : errno;
}

int32_t dgls_host_unlock(uint64_t address, uint64_t bytes) {
  return munlock((const void*)(uintptr_t)address, (size_t)bytes) == 0 ? 0 : errno;
}

uint64_t dgls_host_allocate(uint64_t bytes) {
  void* memory =
      mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return memory == MAP_FAILED ? 0 : (uint64_t)(uintptr_t)memory;
}

void dgls_host_free(uint64_t address, uint64_t bytes) {
  munmap((void*)(uintptr_t)address, (size_t)bytes);
}

int32_t dgls_host_open(const char* path, int64_t* file) {
  int handle = open(path, O_RDONLY | O_CLOEXEC);
  if (handle < 0) return errno;
  *file = handle;
  return 0;
}

int32_t dgls_host_open_direct(int64_t file, int64_t* direct) {
#ifdef O_DIRECT
  /* Not by its path: another file may have that by now. */
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", (int)file);
  int handle = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (handle < 0) return errno;
  *direct = handle;
  return 0;
#else
  (void)file;
  (void)direct;
  return ENOTSUP;
#endif
}

void dgls_host_close(int64_t file) {
  close((int)file);
}

int32_t dgls_host_identity(int64_t file, uint64_t* bytes, int64_t* modified_ns) {
  struct stat facts;
  if (fstat((int)file, &facts) != 0) return errno;
  *bytes = (uint64_t)facts.st_size;
#ifdef __APPLE__
  *modified_ns = (int64_t)facts.st_mtimespec.tv_sec * 1000000000 + facts.st_mtimespec.tv_nsec;
#else
  *modified_ns = (int64_t)facts.st_mtim.tv_sec * 1000000000 + facts.st_mtim.tv_nsec;
#endif
  return 0;
}

int32_t dgls_host_read_at(int64_t file, uint64_t offset, uint64_t address, uint64_t bytes,
                          uint64_t* found) {
  *found = 0;
  while (*found < bytes) {
    uint64_t want = bytes - *found;
    if (want > max_read_bytes) want = max_read_bytes;
    ssize_t got = pread((int)file, (void*)(uintptr_t)(address + *found), (size_t)want,
                        (off_t)(offset + *found));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return 0;
    *found += (uint64_t)got;
  }
  return 0;
}

void dgls_host_copy(uint64_t target, uint64_t source, uint64_t bytes) {
  memcpy((void*)(uintptr_t)target, (const void*)(uintptr_t)source, (size_t)bytes);
}

void dgls_host_fill(uint64_t target, uint8_t value, uint64_t bytes) {
  memset((void*)(uintptr_t)target, value, (size_t)bytes);
}
