//! Bindings of `csrc/host/shim.h`, made by bindgen: `make bindings`.

unsafe extern "C" {
    pub fn dgls_host_page_bytes() -> u64;
}
unsafe extern "C" {
    pub fn dgls_host_lock(address: u64, bytes: u64) -> i32;
}
unsafe extern "C" {
    pub fn dgls_host_unlock(address: u64, bytes: u64) -> i32;
}
unsafe extern "C" {
    pub fn dgls_host_allocate(bytes: u64) -> u64;
}
unsafe extern "C" {
    pub fn dgls_host_free(address: u64, bytes: u64);
}
unsafe extern "C" {
    pub fn dgls_host_open(path: *const ::std::os::raw::c_char, file: *mut i64) -> i32;
}
unsafe extern "C" {
    pub fn dgls_host_close(file: i64);
}
unsafe extern "C" {
    pub fn dgls_host_open_direct(file: i64, direct: *mut i64) -> i32;
}
unsafe extern "C" {
    pub fn dgls_host_identity(file: i64, bytes: *mut u64, modified_ns: *mut i64) -> i32;
}
unsafe extern "C" {
    pub fn dgls_host_read_at(
        file: i64,
        offset: u64,
        address: u64,
        bytes: u64,
        found: *mut u64,
    ) -> i32;
}
unsafe extern "C" {
    pub fn dgls_host_copy(target: u64, source: u64, bytes: u64);
}
unsafe extern "C" {
    pub fn dgls_host_fill(target: u64, value: u8, bytes: u64);
}
