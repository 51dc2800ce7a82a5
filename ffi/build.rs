//! Gives the shared library its SONAME. Which symbols it exports is rustc's doing: the `no_mangle` ones, and a test
//! checks that they are those of the header.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/version.rs");
    let version = std::fs::read_to_string("src/version.rs").expect("src/version.rs");
    let major = number(&version, "AWQUA_ABI_MAJOR");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let env = std::env::var("CARGO_CFG_TARGET_ENV").unwrap_or_default();
    match os.as_str() {
        "linux" | "freebsd" => {
            println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libawqua.so.{major}");
            // Dependencies have `no_mangle` functions of their own (llguidance does), which rustc would export as well.
            println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
        }
        // Android's loader wants the plain name.
        "android" => {
            println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libawqua.so");
            println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
        }
        "macos" | "ios" => {
            println!("cargo::rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libawqua.{major}.dylib");
        }
        "windows" if env == "gnu" => println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-all-symbols"),
        _ => {}
    }
}

/// Value of the constant `name` in the text of a Rust file.
fn number(source: &str, name: &str) -> u32 {
    let line = source.lines().find(|l| l.contains(&format!("const {name}:"))).expect(name);
    line.rsplit('=').next().and_then(|v| v.trim().trim_end_matches(';').parse().ok()).expect(name)
}
