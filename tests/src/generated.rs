//! Files that are generated and committed: compared by tests, rewritten when `AWQUA_BLESS` is set.

use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the repository").to_path_buf()
}

/// Checks that the file at `path`, from the root, is `expected`; with `AWQUA_BLESS` set, makes it so.
///
/// # Panics
/// If it differs.
pub fn check(path: &str, expected: &str) {
    let file = root().join(path);
    let found = std::fs::read_to_string(&file).unwrap_or_default();
    if found == expected {
        return;
    }
    assert!(
        std::env::var_os("AWQUA_BLESS").is_some(),
        "{path} is not what it is generated from; rewrite it with: AWQUA_BLESS=1 cargo test -p awqua-tests --test header"
    );
    std::fs::create_dir_all(file.parent().expect("a file has a folder")).expect(path);
    std::fs::write(&file, expected).expect(path);
}
