/* The shim on Windows. Written from the documentation; not run yet (see ARCHITECTURE.md). */
#include "shim.h"

#include <string.h>
#include <windows.h>

static const uint64_t max_read_bytes = 1u << 30;

uint64_t dgls_host_page_bytes(void) {
  SYSTEM_INFO facts;
  GetSystemInfo(&facts);
  return facts.dwPageSize;
}

int32_t dgls_host_lock(uint64_t address, uint64_t bytes) {
  return VirtualLock((void*)(uintptr_t)address, (SIZE_T)bytes) ? 0 : (int32_t)GetLastError();
}

int32_t dgls_host_unlock(uint64_t address, uint64_t bytes) {
  return VirtualUnlock((void*)(uintptr_t)address, (SIZE_T)bytes) ? 0 : (int32_t)GetLastError();
}

uint64_t dgls_host_allocate(uint64_t bytes) {
  return (uint64_t)(uintptr_t)VirtualAlloc(NULL, (SIZE_T)bytes, MEM_RESERVE | MEM_COMMIT,
                                           PAGE_READWRITE);
}

void dgls_host_free(uint64_t address, uint64_t bytes) {
  (void)bytes; /* MEM_RELEASE takes all of it and refuses a size */
  VirtualFree((void*)(uintptr_t)address, 0, MEM_RELEASE);
}

int32_t dgls_host_open(const char* path, int64_t* file) {
  wchar_t wide[32768];
  if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, 32768) == 0) {
    return (int32_t)GetLastError();
  }
  HANDLE handle = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING,
                              FILE_ATTRIBUTE_NORMAL, NULL);
  if (handle == INVALID_HANDLE_VALUE) return (int32_t)GetLastError();
  *file = (int64_t)(intptr_t)handle;
  return 0;
}

int32_t dgls_host_open_direct(int64_t file, int64_t* direct) {
  HANDLE handle =
      ReOpenFile((HANDLE)(intptr_t)file, GENERIC_READ, FILE_SHARE_READ, FILE_FLAG_NO_BUFFERING);
  if (handle == INVALID_HANDLE_VALUE) return (int32_t)GetLastError();
  *direct = (int64_t)(intptr_t)handle;
  return 0;
}

void dgls_host_close(int64_t file) {
  CloseHandle((HANDLE)(intptr_t)file);
}

int32_t dgls_host_identity(int64_t file, uint64_t* bytes, int64_t* modified_ns) {
  LARGE_INTEGER size;
  FILETIME modified;
  if (!GetFileSizeEx((HANDLE)(intptr_t)file, &size)) return (int32_t)GetLastError();
  if (!GetFileTime((HANDLE)(intptr_t)file, NULL, NULL, &modified)) return (int32_t)GetLastError();
  *bytes = (uint64_t)size.QuadPart;
  *modified_ns =
      (int64_t)((((uint64_t)modified.dwHighDateTime << 32) | modified.dwLowDateTime) * 100);
  return 0;
}

int32_t dgls_host_read_at(int64_t file, uint64_t offset, uint64_t address, uint64_t bytes,
                          uint64_t* found) {
  *found = 0;
  while (*found < bytes) {
    uint64_t want = bytes - *found;
    if (want > max_read_bytes) want = max_read_bytes;
    OVERLAPPED place = {0};
    place.Offset = (DWORD)((offset + *found) & 0xffffffffu);
    place.OffsetHigh = (DWORD)((offset + *found) >> 32);
    DWORD got = 0;
    if (!ReadFile((HANDLE)(intptr_t)file, (void*)(uintptr_t)(address + *found), (DWORD)want, &got,
                  &place)) {
      DWORD error = GetLastError();
      return error == ERROR_HANDLE_EOF ? 0 : (int32_t)error;
    }
    if (got == 0) return 0;
    *found += got;
  }
  return 0;
}

void dgls_host_copy(uint64_t target, uint64_t source, uint64_t bytes) {
  memcpy((void*)(uintptr_t)target, (const void*)(uintptr_t)source, (size_t)bytes);
}

void dgls_host_fill(uint64_t target, uint8_t value, uint64_t bytes) {
  memset((void*)(uintptr_t)target, value, (size_t)bytes);
}
