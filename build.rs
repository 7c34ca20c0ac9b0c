//! Compiles the C shim and the cxx bridge into the static library.

const SHIM_HEADER: &str = "csrc/host/shim.h";

fn main() {
    let target = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let shim = match target.as_str() {
        "windows" => "csrc/host/shim_windows.c",
        _ => "csrc/host/shim_posix.c",
    };
    cc::Build::new().file(shim).warnings(true).compile("dgls_host_shim");

    cxx_build::CFG.include_prefix = "dgls";
    cxx_build::bridge("src/bridge.rs")
        .std("c++17")
        .flag_if_supported("-fvisibility=hidden")
        .compile("dgls_bridge");

    for file in [SHIM_HEADER, shim, "src/bridge.rs"] {
        println!("cargo:rerun-if-changed={file}");
    }
    regenerate_bindings();
}

/// Writes the bindings of the shim anew, into the source tree, where they are committed.
#[cfg(feature = "regen-bindings")]
fn regenerate_bindings() {
    bindgen::Builder::default()
        .header(SHIM_HEADER)
        .allowlist_function("dgls_host_.*")
        .generate_comments(false)
        .disable_header_comment()
        .raw_line("//! Bindings of `csrc/host/shim.h`, made by bindgen: `make bindings`.")
        .rust_target(bindgen::RustTarget::stable(85, 0).unwrap_or_default())
        .generate()
        .expect("bindgen reads csrc/host/shim.h; it needs libclang")
        .write_to_file("src/driver/host/shim_sys.rs")
        .expect("src/driver/host/ is writable");
}

#[cfg(not(feature = "regen-bindings"))]
fn regenerate_bindings() {}
