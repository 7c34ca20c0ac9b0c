/* What the engine asks of the operating system: page-locks, positioned reads, raw copies.
 *
 * One implementation per system: shim_posix.c, shim_windows.c. Every function that can fail
 * returns 0 or the system's error number (errno, GetLastError). */
#ifndef DGLS_HOST_SHIM_H
#define DGLS_HOST_SHIM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes in a page of memory. */
uint64_t dgls_host_page_bytes(void);

/* Keeps [address, address + bytes) in physical memory; undone by dgls_host_unlock. */
int32_t dgls_host_lock(uint64_t address, uint64_t bytes);
int32_t dgls_host_unlock(uint64_t address, uint64_t bytes);

/* Whole pages, straight from the system and back to it; 0 when there are none. */
uint64_t dgls_host_allocate(uint64_t bytes);
void dgls_host_free(uint64_t address, uint64_t bytes);

/* Opens a file for reading and writes its handle to *file. The path is UTF-8. */
int32_t dgls_host_open(const char* path, int64_t* file);
void dgls_host_close(int64_t file);

/* Opens the same file once more, for reads that go past the page cache. Such a read takes offset,
 * address and size as multiples of 4096. Fails where the file system has no such reads. */
int32_t dgls_host_open_direct(int64_t file, int64_t* direct);

/* Size and time of last change of an open file; a change between two calls means other bytes. */
int32_t dgls_host_identity(int64_t file, uint64_t* bytes, int64_t* modified_ns);

/* Reads up to `bytes` bytes at `offset`; *found is less only at the end of the file. */
int32_t dgls_host_read_at(int64_t file, uint64_t offset, uint64_t address, uint64_t bytes,
                          uint64_t* found);

void dgls_host_copy(uint64_t target, uint64_t source, uint64_t bytes);
void dgls_host_fill(uint64_t target, uint8_t value, uint64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
