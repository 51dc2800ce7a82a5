//! Checkpoint folders, well-formed and corrupted: every fault is a typed error that names its place.

mod disk;

use awqua::checkpoint::{Checkpoint, inspect};
use awqua::model::{Finding, Severity, verify};
use awqua::quant::{Quantization, load_linear};
use awqua::tensor::Weight;
use awqua::{Error, ErrorKind};
use disk::{Folder, Tensor, noise, raw_file, safetensors, tensor};
use half::{bf16, f16};
use serde_json::{Value, json};

const MODULE: &str = "model.layers.0.self_attn.q_proj";
const N: usize = 16;
const K: usize = 64;

/// A one-linear checkpoint: AutoAWQ gemm, 16 x 64 in groups of 32, an embedding and a norm.
#[derive(Clone)]
struct Parts {
    config: Value,
    tensors: Vec<Tensor>,
}

impl Parts {
    fn gemm() -> Self {
        let scales = [f16::from_f32(0.01).to_le_bytes(); 2 * N].concat();
        Self {
            config: json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "quantization_config": {
                    "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": true,
                },
            }),
            tensors: vec![
                tensor(&format!("{MODULE}.qweight"), "I32", &[K, N / 8], noise(1, K * N / 2)),
                tensor(&format!("{MODULE}.qzeros"), "I32", &[2, N / 8], noise(2, 2 * N / 2)),
                tensor(&format!("{MODULE}.scales"), "F16", &[2, N], scales),
                tensor("model.embed_tokens.weight", "F16", &[4, 8], vec![0; 64]),
                tensor("model.norm.weight", "F16", &[8], vec![0; 16]),
            ],
        }
    }

    /// The same weights as compressed-tensors pack-quantized with bf16 scales.
    fn pack_quantized(symmetric: bool) -> Self {
        let scales = [bf16::from_f32(0.5).to_le_bytes(); 2 * N].concat();
        let shape = [N as i64, K as i64].map(i64::to_le_bytes).concat();
        let mut tensors = vec![
            tensor(&format!("{MODULE}.weight_packed"), "I32", &[N, K / 8], noise(1, K * N / 2)),
            tensor(&format!("{MODULE}.weight_scale"), "BF16", &[N, 2], scales),
            tensor(&format!("{MODULE}.weight_shape"), "I64", &[2], shape),
            tensor("model.norm.weight", "F16", &[8], vec![0; 16]),
        ];
        if !symmetric {
            tensors.push(tensor(&format!("{MODULE}.weight_zero_point"), "I32", &[N / 8, 2], noise(3, N / 8 * 8)));
        }
        let weights =
            json!({ "num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32 });
        let config = json!({ "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": { "group_0": { "targets": ["Linear"], "weights": weights } },
        }});
        Self { config, tensors }
    }

    fn quantization(&mut self) -> &mut Value {
        &mut self.config["quantization_config"]
    }

    fn tensor(&mut self, suffix: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name.ends_with(suffix)).unwrap()
    }

    fn save(&self) -> Folder {
        let folder = Folder::new();
        folder.write("config.json", self.config.to_string());
        folder.write("model.safetensors", safetensors(&self.tensors));
        folder
    }
}

/// What a model loader does with the folder.
fn load(folder: &Folder) -> Result<Weight, Error> {
    let checkpoint = Checkpoint::open(folder.path())?;
    let quantization = Quantization::of(&checkpoint)?;
    checkpoint.vector("model.norm.weight", 8)?;
    load_linear(&checkpoint, quantization.as_ref(), MODULE, N, K).map(|linear| linear.weight)
}

/// Findings but for those about the configuration, which is no model's here.
fn of_tensors(findings: Vec<Finding>) -> Vec<Finding> {
    findings.into_iter().filter(|f| f.file.as_deref().is_none_or(|file| !file.ends_with("config.json"))).collect()
}

struct Case {
    name: &'static str,
    folder: Folder,
    kind: ErrorKind,
    /// Name of the file in the error; empty: the folder itself.
    file: &'static str,
    tensor: Option<String>,
    /// Words of the message.
    says: &'static [&'static str],
}

fn check(cases: Vec<Case>) {
    let mut wrong = Vec::new();
    for case in cases {
        let name = case.name;
        let error = match load(&case.folder) {
            Ok(_) => {
                wrong.push(format!("{name}: accepted"));
                continue;
            }
            Err(error) => error,
        };
        let expected =
            if case.file.is_empty() { case.folder.path().to_path_buf() } else { case.folder.path().join(case.file) };
        if error.kind() != case.kind {
            wrong.push(format!("{name}: expected {:?}, found {:?}: {error}", case.kind, error.kind()));
        }
        if error.file() != Some(&expected) {
            wrong.push(format!("{name}: expected file {}, found {:?}: {error}", expected.display(), error.file()));
        }
        if error.tensor() != case.tensor.as_deref() {
            wrong.push(format!("{name}: expected tensor {:?}, found {:?}: {error}", case.tensor, error.tensor()));
        }
        for word in case.says {
            if !error.message().contains(word) {
                wrong.push(format!("{name}: the message does not say {word:?}: {error}"));
            }
        }
        if error.to_string().contains('\n') {
            wrong.push(format!("{name}: the message has more than one line"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A case that changes the parts of the gemm checkpoint.
fn parts(
    name: &'static str,
    change: impl FnOnce(&mut Parts),
    kind: ErrorKind,
    file: &'static str,
    suffix: Option<&str>,
    says: &'static [&'static str],
) -> Case {
    of_parts(name, Parts::gemm(), change, kind, file, suffix, says)
}

fn of_parts(
    name: &'static str,
    mut parts: Parts,
    change: impl FnOnce(&mut Parts),
    kind: ErrorKind,
    file: &'static str,
    suffix: Option<&str>,
    says: &'static [&'static str],
) -> Case {
    change(&mut parts);
    let tensor = suffix.map(|suffix| match suffix {
        "norm" => "model.norm.weight".to_owned(),
        _ => format!("{MODULE}.{suffix}"),
    });
    Case { name, folder: parts.save(), kind, file, tensor, says }
}

/// A case with this weight file.
fn file(name: &'static str, bytes: Vec<u8>, tensor: Option<&str>, says: &'static [&'static str]) -> Case {
    let folder = Parts::gemm().save();
    folder.write("model.safetensors", bytes);
    let kind = ErrorKind::InvalidFile;
    Case { name, folder, kind, file: "model.safetensors", tensor: tensor.map(str::to_owned), says }
}

#[test]
fn well_formed_checkpoints_load() {
    for parts in [Parts::gemm(), Parts::pack_quantized(true), Parts::pack_quantized(false)] {
        let folder = parts.save();
        let Weight::W4(matrix) = load(&folder).unwrap() else { panic!("not packed") };
        assert_eq!((matrix.n, matrix.k, matrix.group_size), (N, K, 32));
        let findings = of_tensors(verify(&Checkpoint::open(folder.path()).unwrap()).unwrap());
        assert_eq!(findings, []);
    }
}

#[test]
fn corrupted_weight_files_are_refused_by_name() {
    let good = safetensors(&Parts::gemm().tensors);
    let entry = |offsets: &str| format!(r#"{{"t":{{"dtype":"U8","shape":[8],"data_offsets":{offsets}}}}}"#);
    let two = |second: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[8],"data_offsets":[0,8]}},"b":{{"dtype":"U8","shape":[8],"data_offsets":{second}}}}}"#
        )
    };
    let shaped =
        |dtype: &str, shape: &str| format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,8]}}}}"#);
    let mut names = String::from("{\"");
    names.push_str(&"x".repeat(600));
    names.push_str(r#"":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#);
    check(vec![
        file("empty file", vec![], None, &["at least 8", "found 0"]),
        file("half a length", vec![1, 2, 3], None, &["at least 8", "found 3"]),
        file("header bomb", [&u64::MAX.to_le_bytes()[..], b"{}"].concat(), None, &["header claims", "100000000"]),
        file(
            "header past the end",
            [&90_000_000u64.to_le_bytes()[..], b"{}"].concat(),
            None,
            &["truncated", "found 2"],
        ),
        file("truncated header", good[..40].to_vec(), None, &["truncated"]),
        file("truncated data", good[..good.len() - 1].to_vec(), Some("model.norm.weight"), &["truncated"]),
        file("trailing bytes", [&good[..], b"x"].concat(), None, &["1 bytes after"]),
        file("not JSON", raw_file("{\"t\":", &[]), Some("t"), &["not valid"]),
        file("not UTF-8", [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(), None, &["UTF-8"]),
        file("text after the header", raw_file("{} {}", &[]), None, &["trailing"]),
        file("deep nesting", raw_file(&"[".repeat(100_000), &[]), None, &["not valid"]),
        file(
            "deep metadata",
            raw_file(&format!("{{\"__metadata__\":{}", "[".repeat(100_000)), &[]),
            Some("__metadata__"),
            &["EOF"],
        ),
        file("unknown dtype", raw_file(&shaped("F1024", "[8]"), &[0; 8]), Some("t"), &["F1024"]),
        file("negative size", raw_file(&shaped("U8", "[-8]"), &[0; 8]), Some("t"), &["-8"]),
        file(
            "absurd size",
            raw_file(&shaped("F32", "[4294967295,4294967295,4294967295]"), &[0; 8]),
            Some("t"),
            &["overflows"],
        ),
        file("absurd bits", raw_file(&shaped("F64", "[4611686018427387904]"), &[0; 8]), Some("t"), &["overflows"]),
        file("too many dimensions", raw_file(&shaped("U8", "[1,1,1,1,1,1,1,1,8]"), &[0; 8]), Some("t"), &["9"]),
        file("shape against offsets", raw_file(&shaped("U8", "[9]"), &[0; 8]), Some("t"), &["needs 9 bytes"]),
        file("part of a byte", raw_file(&shaped("F4", "[3]"), &[0; 8]), Some("t"), &["whole bytes"]),
        file("offsets backwards", raw_file(&entry("[8,0]"), &[0; 8]), Some("t"), &["8..0"]),
        file("offsets past the end", raw_file(&entry("[8,16]"), &[0; 8]), Some("t"), &["truncated", "8 bytes"]),
        file(
            "offset overflow",
            raw_file(&entry("[18446744073709551608,18446744073709551616]"), &[0; 8]),
            Some("t"),
            &["not valid"],
        ),
        file(
            "huge offsets",
            raw_file(&entry("[18446744073709551600,18446744073709551608]"), &[0; 8]),
            Some("t"),
            &["truncated"],
        ),
        file(
            "overlap",
            raw_file(&two("[4,12]"), &[0; 16]),
            Some("b"),
            &["overlaps", "expected data offset 8, found 4"],
        ),
        file("same bytes twice", raw_file(&two("[0,8]"), &[0; 8]), Some("b"), &["overlaps"]),
        file("gap", raw_file(&two("[9,17]"), &[0; 17]), Some("b"), &["gap", "expected data offset 8, found 9"]),
        file(
            "two of one name",
            raw_file(&two("[8,16]").replace("\"b\"", "\"a\""), &[0; 16]),
            Some("a"),
            &["two entries"],
        ),
        file("endless name", raw_file(&names, &[0; 8]), None, &["600"]),
        file(
            "control character in a name",
            raw_file(r#"{"a\nb":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#, &[0; 8]),
            None,
            &["control"],
        ),
    ]);
}

#[test]
fn wrong_tensors_are_refused_by_name() {
    use ErrorKind::{InvalidConfig, InvalidTensor};
    const FILE: &str = "model.safetensors";
    let f16s = |value: f32, count: usize| vec![f16::from_f32(value).to_le_bytes(); count].concat();
    let remove = |suffix: &'static str| move |p: &mut Parts| p.tensors.retain(|t| !t.name.ends_with(suffix));
    check(vec![
        parts("missing scales", remove("scales"), InvalidTensor, "", Some("scales"), &["missing"]),
        parts("missing zeros", remove("qzeros"), InvalidTensor, "", Some("qzeros"), &["missing"]),
        parts("missing codes", remove("qweight"), InvalidTensor, "", Some("qweight"), &["missing"]),
        parts("missing norm", remove("norm.weight"), InvalidTensor, "", Some("norm"), &["missing"]),
        parts(
            "codes of another type",
            |p| p.tensor("qweight").dtype = "F32",
            InvalidTensor,
            FILE,
            Some("qweight"),
            &["I32", "F32"],
        ),
        parts(
            "scales of another type",
            |p| p.tensor("scales").dtype = "I16",
            InvalidTensor,
            FILE,
            Some("scales"),
            &["F16", "I16"],
        ),
        parts(
            "norm of another type",
            |p| p.tensor("norm.weight").dtype = "I16",
            InvalidTensor,
            FILE,
            Some("norm"),
            &["F16", "I16"],
        ),
        parts(
            "transposed codes",
            |p| p.tensor("qweight").shape = vec![2, 64],
            InvalidTensor,
            FILE,
            Some("qweight"),
            &["[64, 2]", "[2, 64]"],
        ),
        parts(
            "flat zeros",
            |p| p.tensor("qzeros").shape = vec![4],
            InvalidTensor,
            FILE,
            Some("qzeros"),
            &["[2, 2]", "[4]"],
        ),
        parts(
            "transposed scales",
            |p| p.tensor("scales").shape = vec![16, 2],
            InvalidTensor,
            FILE,
            Some("scales"),
            &["[2, 16]", "[16, 2]"],
        ),
        parts(
            "matrix as norm",
            |p| p.tensor("norm.weight").shape = vec![2, 4],
            InvalidTensor,
            FILE,
            Some("norm"),
            &["[8]", "[2, 4]"],
        ),
        parts(
            "NaN scales",
            |p| p.tensor("scales").data[8..10].copy_from_slice(&f16::NAN.to_le_bytes()),
            InvalidTensor,
            FILE,
            Some("scales"),
            &["NaN", "element 4"],
        ),
        parts(
            "infinite scales",
            |p| p.tensor("scales").data = f16s(f32::INFINITY, 32),
            InvalidTensor,
            FILE,
            Some("scales"),
            &["inf", "element 0"],
        ),
        parts(
            "NaN norm",
            |p| p.tensor("norm.weight").data = f16s(f32::NAN, 8),
            InvalidTensor,
            FILE,
            Some("norm"),
            &["NaN"],
        ),
        parts(
            "other group size",
            |p| p.quantization()["group_size"] = json!(64),
            InvalidTensor,
            FILE,
            Some("qzeros"),
            &["[1, 2]", "[2, 2]"],
        ),
        parts(
            "group size that does not divide",
            |p| p.quantization()["group_size"] = json!(128),
            InvalidConfig,
            FILE,
            Some("qweight"),
            &["128", "64"],
        ),
        parts(
            "gemv said, gemm stored",
            |p| p.quantization()["version"] = json!("GEMV"),
            InvalidTensor,
            FILE,
            Some("qweight"),
            &["[16, 8]", "[64, 2]"],
        ),
        parts(
            "gemv_fast said, gemm stored",
            |p| p.quantization()["version"] = json!("gemv_fast"),
            InvalidTensor,
            FILE,
            Some("qweight"),
            &["I16", "I32"],
        ),
        parts(
            "no quantization said",
            |p| p.config = json!({}),
            InvalidConfig,
            FILE,
            Some("qweight"),
            &["does not say"],
        ),
        parts(
            "packed and dense",
            |p| p.tensors.push(tensor(&format!("{MODULE}.weight"), "F16", &[N, K], vec![0; 2 * N * K])),
            InvalidConfig,
            FILE,
            Some("qweight"),
            &["stored as well"],
        ),
        parts(
            "dense where packed is said",
            |p| {
                remove("qweight")(p);
                p.tensors.push(tensor(&format!("{MODULE}.weight"), "F16", &[N, K], vec![0; 2 * N * K]));
            },
            InvalidConfig,
            FILE,
            Some("weight"),
            &["awq gemm"],
        ),
        of_parts(
            "infinite bf16 scales",
            Parts::pack_quantized(true),
            |p| p.tensor("weight_scale").data = [bf16::INFINITY.to_le_bytes(); 32].concat(),
            InvalidTensor,
            FILE,
            Some("weight_scale"),
            &["finite", "inf"],
        ),
        of_parts(
            "another shape stated",
            Parts::pack_quantized(true),
            |p| p.tensor("weight_shape").data = vec![1; 16],
            InvalidTensor,
            FILE,
            Some("weight_shape"),
            &["[16, 64]"],
        ),
        of_parts(
            "asymmetric said, symmetric stored",
            Parts::pack_quantized(true),
            |p| p.quantization()["config_groups"]["group_0"]["weights"]["symmetric"] = json!(false),
            InvalidTensor,
            "",
            Some("weight_zero_point"),
            &["missing"],
        ),
        of_parts(
            "symmetric said, asymmetric stored",
            Parts::pack_quantized(false),
            |p| p.quantization()["config_groups"]["group_0"]["weights"]["symmetric"] = json!(true),
            InvalidTensor,
            FILE,
            Some("weight_zero_point"),
            &["symmetric"],
        ),
        of_parts(
            "unpacked zero points",
            Parts::pack_quantized(false),
            |p| {
                let t = p.tensor("weight_zero_point");
                t.dtype = "I8";
                t.shape = vec![N, 1];
            },
            InvalidTensor,
            FILE,
            Some("weight_zero_point"),
            &["[16, 2]", "[16, 1]"],
        ),
        of_parts(
            "group order",
            Parts::pack_quantized(true),
            |p| p.tensors.push(tensor(&format!("{MODULE}.weight_g_idx"), "I32", &[K], vec![0; 4 * K])),
            InvalidTensor,
            FILE,
            Some("weight_g_idx"),
            &["actorder"],
        ),
        of_parts(
            "ignored but packed",
            Parts::pack_quantized(true),
            |p| p.quantization()["ignore"] = json!(["re:.*q_proj$"]),
            InvalidConfig,
            FILE,
            Some("weight_packed"),
            &["does not say"],
        ),
        of_parts(
            "awq said, compressed stored",
            Parts::pack_quantized(true),
            |p| p.config = Parts::gemm().config,
            InvalidConfig,
            FILE,
            Some("weight_packed"),
            &["awq gemm", "qweight"],
        ),
        of_parts(
            "group size that divides nothing",
            Parts::pack_quantized(true),
            |p| p.quantization()["config_groups"]["group_0"]["weights"]["group_size"] = json!(12),
            InvalidConfig,
            FILE,
            Some("weight_packed"),
            &["12", "64"],
        ),
    ]);
}

#[test]
fn other_quantizations_are_refused_by_their_name() {
    use ErrorKind::{InvalidConfig, Unsupported};
    let config = |name: &'static str, section: Value, kind, says| {
        parts(name, |p| *p.quantization() = section, kind, "config.json", None, says)
    };
    let awq = |key: &str, value: Value| {
        let mut section = Parts::gemm().quantization().clone();
        section[key] = value;
        section
    };
    let gptq = |key: &str, value: Value| {
        let mut section = json!({ "quant_method": "gptq", "bits": 4, "group_size": 128 });
        section[key] = value;
        section
    };
    let packed = |change: &dyn Fn(&mut Value, &mut Value)| {
        let mut section = Parts::pack_quantized(true).quantization().clone();
        let mut group = section["config_groups"]["group_0"].clone();
        change(&mut section, &mut group);
        section["config_groups"]["group_0"] = group;
        section
    };
    let long = "x".repeat(100_000);
    check(vec![
        config("gptq marlin", gptq("checkpoint_format", json!("marlin")), Unsupported, &["marlin"]),
        config("gptq in planes", gptq("checkpoint_format", json!("gptq_p")), Unsupported, &["gptq_p"]),
        config("gptq of 5 bits", gptq("bits", json!(5)), Unsupported, &["5-bit"]),
        config("gptq in bytes", gptq("pack_dtype", json!("int8")), Unsupported, &["int8"]),
        config("gptq with a wrong flag", gptq("desc_act", json!("no")), InvalidConfig, &["desc_act"]),
        config("bitsandbytes of 8 bits", json!({ "quant_method": "bitsandbytes" }), Unsupported, &["8 bits"]),
        config(
            "nvfp4 of ModelOpt",
            json!({ "quant_method": "modelopt", "quant_algo": "NVFP4" }),
            Unsupported,
            &["NVFP4"],
        ),
        config(
            "AutoRound floats",
            json!({ "quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp" }),
            Unsupported,
            &["mx_fp"],
        ),
        config("mxfp4", json!({ "quant_method": "mxfp4" }), Unsupported, &["mxfp4"]),
        config("long unknown method", json!({ "quant_method": long }), Unsupported, &["xxx..."]),
        config("no method", json!({ "bits": 4 }), InvalidConfig, &["quant_method"]),
        config("method is a number", json!({ "quant_method": 4 }), InvalidConfig, &["found 4"]),
        config("section is a list", json!([]), InvalidConfig, &["object"]),
        config("marlin", awq("version", json!("marlin")), Unsupported, &["marlin"]),
        config("8 bits", awq("bits", json!(8)), Unsupported, &["8-bit"]),
        config("negative bits", awq("bits", json!(-4)), InvalidConfig, &["-4"]),
        config("group size -2", awq("group_size", json!(-2)), InvalidConfig, &["found -2"]),
        config("group size as text", awq("group_size", json!("128")), InvalidConfig, &["128"]),
        config("huge group size", awq("group_size", json!(1e300)), InvalidConfig, &["1e+300"]),
        config(
            "excluded modules of numbers",
            awq("modules_to_not_convert", json!([1])),
            InvalidConfig,
            &["modules_to_not_convert"],
        ),
        config("nvfp4", packed(&|s, _| s["format"] = json!("nvfp4-pack-quantized")), Unsupported, &["nvfp4"]),
        config("marlin-24", packed(&|s, _| s["format"] = json!("marlin-24")), Unsupported, &["marlin-24"]),
        config(
            "sparse",
            packed(&|s, _| s["sparsity_config"] = json!({ "format": "sparse-24-bitmask" })),
            Unsupported,
            &["sparse-24"],
        ),
        config(
            "rotated",
            packed(&|s, _| s["transform_config"] = json!({ "config_groups": { "R1": {} } })),
            Unsupported,
            &["transform_config"],
        ),
        config("7-bit group", packed(&|_, g| g["weights"]["num_bits"] = json!(7)), Unsupported, &["group_0", "7-bit"]),
        config("float weights", packed(&|_, g| g["weights"]["type"] = json!("float")), Unsupported, &["float"]),
        config(
            "activations",
            packed(&|_, g| g["input_activations"] = json!({ "num_bits": 8 })),
            Unsupported,
            &["input_activations"],
        ),
        config("other order", packed(&|_, g| g["weights"]["actorder"] = json!("random")), Unsupported, &["actorder"]),
        config("in blocks", packed(&|_, g| g["weights"]["strategy"] = json!("block")), Unsupported, &["block"]),
        config(
            "group without size",
            packed(&|_, g| {
                g["weights"].as_object_mut().unwrap().remove("group_size");
            }),
            InvalidConfig,
            &["group_size"],
        ),
        config("no targets", packed(&|_, g| g["targets"] = json!([])), InvalidConfig, &["targets"]),
        config("broken pattern", packed(&|_, g| g["targets"] = json!(["re:("])), Unsupported, &["pattern"]),
        config(
            "long pattern",
            packed(&|_, g| g["targets"] = json!([format!("re:{}", "(".repeat(400))])),
            Unsupported,
            &["400 bytes"],
        ),
        config(
            "pattern bomb",
            packed(&|_, g| g["targets"] = json!(["re:((a{1000}){1000}){1000}"])),
            Unsupported,
            &["pattern"],
        ),
        config(
            "no groups",
            json!({ "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {} }),
            InvalidConfig,
            &["config_groups"],
        ),
    ]);
    check(vec![parts(
        "MLX",
        |p| p.config = json!({ "quantization": { "group_size": 32, "bits": 4, "mode": "mxfp4" } }),
        Unsupported,
        "config.json",
        None,
        &["MLX", "mxfp4"],
    )]);
}

#[test]
fn slow_patterns_end() {
    let mut parts = Parts::pack_quantized(true);
    // Catastrophic for a backtracking matcher; the look-ahead keeps it from the linear-time engine.
    let pattern = r"re:(?=(a+)+$)b|((\w+)*)*\1!";
    parts.quantization()["config_groups"]["group_0"]["targets"] = json!([pattern]);
    let error = load(&parts.save()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidConfig), "{error}");
}

/// The gemm checkpoint in two shards with an index.
fn sharded() -> (Parts, Folder, Value) {
    let parts = Parts::gemm();
    let folder = Folder::new();
    folder.write("config.json", parts.config.to_string());
    let (first, second) = parts.tensors.split_at(2);
    folder.write("a.safetensors", safetensors(first));
    folder.write("b.safetensors", safetensors(second));
    let names =
        |tensors: &[Tensor], file: &str| tensors.iter().map(|t| (t.name.clone(), json!(file))).collect::<Vec<_>>();
    let map: serde_json::Map<String, Value> =
        names(first, "a.safetensors").into_iter().chain(names(second, "b.safetensors")).collect();
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    folder.write("model.safetensors.index.json", index.to_string());
    (parts, folder, index)
}

#[test]
fn shards_load_and_their_index_is_checked() {
    let (_, folder, _) = sharded();
    load(&folder).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let sizes = ["a.safetensors", "b.safetensors"].map(|f| std::fs::metadata(folder.path().join(f)).unwrap().len());
    assert_eq!(checkpoint.bytes_on_disk(), sizes.iter().sum::<u64>());
    let names: Vec<_> = checkpoint.tensors().map(|t| t.name.as_str()).collect();
    assert!(names.is_sorted() && names.len() == 5, "{names:?}");

    const INDEX: &str = "model.safetensors.index.json";
    let norm = "model.norm.weight";
    let case = |name, change: &dyn Fn(&Folder, &mut Value), kind, file, tensor: Option<&str>, says| {
        let (_, folder, mut index) = sharded();
        change(&folder, &mut index);
        folder.write(INDEX, index.to_string());
        Case { name, folder, kind, file, tensor: tensor.map(str::to_owned), says }
    };
    let escape = |name, target: &'static str| {
        case(
            name,
            &|_, index: &mut Value| index["weight_map"][norm] = json!(target),
            ErrorKind::InvalidFile,
            INDEX,
            Some(norm),
            &["plain file name"],
        )
    };
    use ErrorKind::{InvalidFile, Io};
    check(vec![
        escape("parent folder", "../b.safetensors"),
        escape("parent by itself", ".."),
        escape("current folder", "./b.safetensors"),
        escape("absolute", "/etc/passwd"),
        escape("subfolder", "sub/b.safetensors"),
        escape("backslash", "..\\b.safetensors"),
        escape("drive", "C:b.safetensors"),
        escape("empty", ""),
        escape("nul", "b\0.safetensors"),
        case(
            "missing shard",
            &|_, i| i["weight_map"][norm] = json!("c.safetensors"),
            Io,
            "c.safetensors",
            None,
            &["not found"],
        ),
        case(
            "tensor in the other shard",
            &|_, i| i["weight_map"][norm] = json!("a.safetensors"),
            InvalidFile,
            INDEX,
            Some(norm),
            &["says a.safetensors", "found in b.safetensors"],
        ),
        case(
            "tensor in no shard",
            &|_, i| i["weight_map"]["ghost"] = json!("a.safetensors"),
            InvalidFile,
            INDEX,
            Some("ghost"),
            &["no shard"],
        ),
        case("no weight map", &|_, i| *i = json!({}), InvalidFile, INDEX, None, &["weight_map"]),
        case("empty weight map", &|_, i| i["weight_map"] = json!({}), InvalidFile, INDEX, None, &["empty"]),
        case(
            "weight map of numbers",
            &|_, i| i["weight_map"] = json!({ "t": 1 }),
            InvalidFile,
            INDEX,
            None,
            &["not a valid index"],
        ),
        case(
            "tensor in both shards",
            &|f, _| f.write("b.safetensors", safetensors(&Parts::gemm().tensors[1..])),
            InvalidFile,
            "b.safetensors",
            Some("model.layers.0.self_attn.q_proj.qzeros"),
            &["also in"],
        ),
    ]);

    let (_, folder, _) = sharded();
    folder.write(INDEX, r#"{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}"#);
    assert!(load(&folder).unwrap_err().message().contains("listed twice"));
}

#[cfg(unix)]
#[test]
#[expect(clippy::print_stderr, reason = "a skipped part has to be visible")]
fn links_and_pipes_in_the_folder() {
    // Download caches link the folder's files to a store beside it, so links to regular files have to work.
    let (_, folder, _) = sharded();
    let store = Folder::new();
    std::fs::rename(folder.path().join("b.safetensors"), store.path().join("blob")).unwrap();
    std::os::unix::fs::symlink(store.path().join("blob"), folder.path().join("b.safetensors")).unwrap();
    load(&folder).unwrap();

    // Anything else is refused without opening it: a pipe without a writer would block for ever.
    for target in ["/dev/zero", "/"] {
        std::fs::remove_file(folder.path().join("b.safetensors")).unwrap();
        std::os::unix::fs::symlink(target, folder.path().join("b.safetensors")).unwrap();
        let error = load(&folder).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFile);
        assert_eq!(error.file().unwrap(), folder.path().join("b.safetensors"));
    }
    std::fs::remove_file(folder.path().join("b.safetensors")).unwrap();
    let made = std::process::Command::new("mkfifo").arg(folder.path().join("b.safetensors")).status();
    if made.is_ok_and(|status| status.success()) {
        assert_eq!(load(&folder).unwrap_err().kind(), ErrorKind::InvalidFile);
    } else {
        eprintln!("skipped: no mkfifo here");
    }
}

#[test]
fn folders_without_a_checkpoint_say_what_is_missing() {
    let empty = Folder::new();
    let error = load(&empty).unwrap_err();
    assert_eq!((error.kind(), error.file()), (ErrorKind::Io, Some(&*empty.path().join("config.json"))));
    empty.write("config.json", "{}");
    let error = load(&empty).unwrap_err();
    assert_eq!((error.kind(), error.file()), (ErrorKind::Io, Some(empty.path())));
    empty.write("pytorch_model.bin", "");
    assert_eq!(load(&empty).unwrap_err().kind(), ErrorKind::Unsupported);
    empty.write("config.json", "[1]");
    assert_eq!(load(&empty).unwrap_err().kind(), ErrorKind::InvalidFile);
    empty.write("config.json", vec![b' '; 9 << 20]);
    let error = load(&empty).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidFile && error.message().contains("at most"), "{error}");
    empty.write("config.json", "[".repeat(1 << 20));
    assert_eq!(load(&empty).unwrap_err().kind(), ErrorKind::InvalidFile);
    let file = empty.path().join("config.json");
    assert_eq!(Checkpoint::open(&file).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn older_key_sets_and_exclusions_are_read() {
    // A separate file with the keys of AutoAWQ's first versions.
    let mut parts = Parts::gemm();
    parts.config = json!({});
    let folder = parts.save();
    folder.write("quant_config.json", r#"{"zero_point":true,"q_group_size":32,"w_bit":4,"version":"GEMM"}"#);
    load(&folder).unwrap();

    let excluded = |config: &Value, module: &str| {
        Quantization::from_config(config, None).unwrap().unwrap().scheme_of(module).unwrap().is_none()
    };
    let mut parts = Parts::gemm();
    parts.quantization()["modules_to_not_convert"] = json!(["gate"]);
    assert!(excluded(&parts.config, "model.layers.0.block_sparse_moe.gate"));
    assert!(!excluded(&parts.config, "model.layers.0.self_attn.q_proj"));
    parts.quantization()["group_size"] = json!(-1);
    assert_eq!(Quantization::from_config(&parts.config, None).unwrap().unwrap().scheme().group_size, None);

    // Exact targets win over patterns, patterns over the class; patterns match at the start of the name.
    let group = |targets: Value, size: usize| {
        json!({ "targets": targets,
                "weights": { "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": size } })
    };
    let config = json!({ "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*router", "re:visual"],
        "config_groups": {
            "a": group(json!(["Linear"]), 32),
            "b": group(json!(["re:.*down_proj$"]), 64),
            "c": group(json!(["model.layers.3.mlp.down_proj"]), 128),
        },
    }});
    let quantization = Quantization::from_config(&config, None).unwrap().unwrap();
    let size = |module: &str| quantization.scheme_of(module).unwrap().map(|scheme| scheme.group_size.unwrap());
    assert_eq!(size("model.layers.0.mlp.up_proj"), Some(32));
    assert_eq!(size("model.layers.0.mlp.down_proj"), Some(64));
    assert_eq!(size("model.layers.3.mlp.down_proj"), Some(128));
    for ignored in ["lm_head", "model.layers.0.router", "visual.blocks.0.fc"] {
        assert_eq!(size(ignored), None, "{ignored}");
    }
    assert_eq!(size("model.visual.fc"), Some(32));
}

#[test]
fn inspect_and_verify_report_the_facts() {
    let mut parts = Parts::gemm();
    parts.tensors.push(tensor("lm_head.weight", "F16", &[4, 8], vec![0; 64]));
    let folder = parts.save();
    let facts = inspect(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    assert_eq!(facts.architecture.as_deref(), Some("LlamaForCausalLM"));
    assert_eq!((facts.dialect, facts.bits, facts.group_size), (Some("awq gemm"), Some(4), Some(32)));
    assert_eq!(facts.unquantized_linears, ["lm_head"]);
    // 16 x 64 codes and 16 x 2 groups of a word; embedding and head as stored; 8 norm weights in f32.
    assert_eq!(facts.device_bytes, 16 * 64 / 2 + 16 * 2 * 4 + 2 * 64 + 8 * 4);
    let json = serde_json::to_value(&facts).unwrap();
    assert_eq!(json["tensors"][0]["name"], "lm_head.weight");
    assert_eq!(json["tensors"][2]["kind"], "codes");
    assert_eq!(json["tensors"].as_array().unwrap().len(), 6);

    let findings = |parts: &Parts| of_tensors(verify(&Checkpoint::open(parts.save().path()).unwrap()).unwrap());
    let mut zero = Parts::gemm();
    zero.tensor("scales").data[..4].fill(0);
    let found = findings(&zero);
    assert!(found.len() == 1 && found[0].severity == Severity::Warning, "{found:?}");
    assert!(found[0].message.starts_with("2 of its groups"), "{found:?}");

    let mut broken = Parts::gemm();
    broken.tensor("scales").data[..2].copy_from_slice(&f16::NAN.to_le_bytes());
    broken.tensor("embed_tokens.weight").data[6..8].copy_from_slice(&f16::INFINITY.to_le_bytes());
    let found = findings(&broken);
    let tensors: Vec<_> = found.iter().map(|f| f.tensor.clone().unwrap()).collect();
    assert_eq!(tensors, ["model.embed_tokens.weight", &format!("{MODULE}.scales")]);
    assert!(found.iter().all(|f| f.severity == Severity::Error && f.file.is_some()), "{found:?}");
    assert!(found[0].message.contains("element 3 is inf"), "{found:?}");

    let (_, folder, mut index) = sharded();
    index["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
    folder.write("model.safetensors.index.json", index.to_string());
    let found = of_tensors(verify(&Checkpoint::open(folder.path()).unwrap()).unwrap());
    assert!(
        found.len() == 1 && found[0].severity == Severity::Warning && found[0].message.contains("index"),
        "{found:?}"
    );
}
