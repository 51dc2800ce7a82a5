//! Packed weights of every dialect against the numbers of the software that wrote them, and round trips.

mod disk;

use std::path::{Path, PathBuf};

use awqua::ErrorKind;
use awqua::checkpoint::Checkpoint;
use awqua::quant::{
    Dialect, LinearShape, LinearWeight, Quantization, ROW_STEP, awq, linear_shape, load_linear, load_rows,
};
use awqua::tensor::{Bytes, DenseMatrix, DenseType, Offset, W4Matrix, Weight};
use awqua_quantizer::quantize_matrix;
use awqua_quantizer::rtn::{Progress, Report, Rest, RtnOptions, quantize_rtn};
use disk::{Folder, noise, safetensors, tensor};
use half::f16;
use serde_json::json;
use sha2::{Digest, Sha256};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Every fixture folder with packed weights, i.e. whose reference has hashes of dequantized tensors.
fn packed_fixtures() -> Vec<(PathBuf, serde_json::Value)> {
    let mut found = Vec::new();
    for kind in ["formats", "arch"] {
        for entry in std::fs::read_dir(fixtures().join(kind)).unwrap() {
            let dir = entry.unwrap().path();
            let text = std::fs::read_to_string(dir.join("reference/reference.json")).unwrap();
            let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
            if let Some(hashes) = reference
                .get("dequant_f16_sha256")
                .filter(|hashes| hashes.as_object().is_some_and(|map| !map.is_empty()))
            {
                // One file, or the folder.
                let path = reference["file"].as_str().map_or_else(|| dir.clone(), |file| dir.join(file));
                found.push((path, hashes.clone()));
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// SHA-256 of a matrix in half precision, row-major, little-endian, its columns in the order of the inputs.
fn hash(linear: &LinearWeight) -> String {
    let mut hasher = Sha256::new();
    let (n, k) = linear.weight.dims();
    let mut row = vec![0.0; k];
    for n in 0..n {
        linear.expand_row(n, &mut row);
        let bytes: Vec<u8> = row.iter().flat_map(|&w| f16::from_f32(w).to_le_bytes()).collect();
        hasher.update(&bytes);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// (N, K) of a linear, from the dense weights' config rather than from the tensors that are to be checked.
fn shape(config: &serde_json::Value, module: &str) -> (usize, usize) {
    let number = |key: &str| config.get(key).and_then(serde_json::Value::as_u64).map(|v| v as usize);
    let hidden = number("hidden_size").unwrap();
    let inter = number("intermediate_size").unwrap();
    let heads = number("num_attention_heads").unwrap();
    let head_dim = number("head_dim").unwrap_or(hidden / heads);
    let kv = number("num_key_value_heads").unwrap_or(heads) * head_dim;
    match module.rsplit('.').next().unwrap() {
        "q_proj" => (heads * head_dim, hidden),
        "k_proj" | "v_proj" => (kv, hidden),
        "o_proj" => (hidden, heads * head_dim),
        "gate_proj" | "up_proj" => (inter, hidden),
        "down_proj" => (hidden, inter),
        other => panic!("unexpected module {other}"),
    }
}

/// What is promised of a module is what it is, and pieces of it make the whole.
fn check_pieces(checkpoint: &Checkpoint, quantization: &Quantization, module: &str, whole: &LinearWeight) {
    let (n, k) = whole.weight.dims();
    let shape = linear_shape(checkpoint, Some(quantization), module, n, k).unwrap();
    assert_eq!(shape, LinearShape { weight: whole.weight.shape(), input: whole.input.clone() }, "{module}");
    for step in [ROW_STEP, 3 * ROW_STEP] {
        let mut joined: Option<Weight> = None;
        for first in (0..n).step_by(step) {
            let rows = first..n.min(first + step);
            let Some(part) = load_rows(checkpoint, Some(quantization), module, (n, k), rows).unwrap() else {
                assert!(quantization.dialect() == Dialect::BitsAndBytes && first == 0, "{module} is cut");
                return;
            };
            let part = part.widened(&shape.weight);
            match &mut joined {
                None => joined = Some(part),
                Some(joined) => joined.append(part).unwrap(),
            }
        }
        assert!(joined.as_ref() == Some(&whole.weight), "{module} in steps of {step}");
    }
}

#[test]
fn every_packed_tensor_dequantizes_to_the_writers_bytes() {
    let mut dialects = std::collections::HashSet::new();
    let mut tensors = 0;
    let mut wrong = Vec::new();
    for (dir, hashes) in packed_fixtures() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let quantization = Quantization::of(&checkpoint).unwrap().expect("a packed fixture");
        dialects.insert(quantization.dialect());
        for (name, expected) in hashes.as_object().unwrap() {
            let module = name.strip_suffix(".weight").unwrap();
            let (n, k) = shape(checkpoint.config(), module);
            let linear = load_linear(&checkpoint, Some(&quantization), module, n, k).unwrap();
            assert!(linear.weight.bits().is_some(), "{name} of {} is not packed", dir.display());
            check_pieces(&checkpoint, &quantization, module, &linear);
            tensors += 1;
            if hash(&linear) != expected.as_str().unwrap() {
                wrong.push(format!("{}: {name}", dir.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {tensors} tensors differ: {wrong:#?}", wrong.len());
    assert!(dialects.len() >= 12, "a dialect has no fixture: {dialects:?}");
    assert!(tensors > 150, "only {tensors} tensors were compared");
}

/// A matrix with random codes, zero points and scales.
fn random_matrix(seed: u64, n: usize, k: usize, group_size: usize) -> W4Matrix {
    let words = |seed, count: usize| -> Vec<u32> {
        noise(seed, 4 * count).chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let params = words(seed + 1, n * (k / group_size)).into_iter().map(|word| {
        // Any finite positive scale: the exponent's top bit is cleared.
        let scale = f16::from_bits(word as u16 & 0x3fff);
        let zero = f16::from_f32((word >> 16 & 15) as f32);
        u32::from(scale.to_bits()) | u32::from(zero.to_bits()) << 16
    });
    W4Matrix::new((n, k), group_size, words(seed, n * (k / 8)), params.collect(), Offset::Zero).unwrap()
}

/// Saves a module in `gemm` form and loads it back.
fn through_gemm(matrix: &W4Matrix) -> W4Matrix {
    let tensors = awq::encode_gemm(matrix).unwrap();
    let bytes = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let scales = tensors.scales.iter().flat_map(|s| s.to_le_bytes()).collect();
    let (n, k, groups) = (matrix.n, matrix.k, matrix.groups());
    let folder = Folder::new();
    // An odd number of bytes before the codes: files promise no alignment.
    let file = safetensors(&[
        tensor("pad", "U8", &[3], vec![0; 3]),
        tensor("layers.0.fc.qweight", "I32", &[k, n / 8], bytes(&tensors.qweight)),
        tensor("layers.0.fc.qzeros", "I32", &[groups, n / 8], bytes(&tensors.qzeros)),
        tensor("layers.0.fc.scales", "F16", &[groups, n], scales),
    ]);
    folder.write("model.safetensors", file);
    let config = json!({ "quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": matrix.group_size, "version": "gemm",
    }});
    folder.write("config.json", config.to_string());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let quantization = Quantization::of(&checkpoint).unwrap();
    match load_linear(&checkpoint, quantization.as_ref(), "layers.0.fc", n, k).unwrap().weight {
        Weight::W4(matrix) => matrix,
        _ => panic!("not packed"),
    }
}

#[test]
fn gemm_encodes_and_decodes_every_shape() {
    // One block, one tile, more than a tile both ways, ragged tiles, one row of groups.
    for (n, k, group_size) in
        [(8, 8, 8), (128, 128, 32), (136, 264, 24), (8, 1024, 128), (1000, 8, 8), (264, 160, 160), (40, 576, 64)]
    {
        let matrix = random_matrix((n * k) as u64, n, k, group_size);
        let back = through_gemm(&matrix);
        assert_eq!(back.qweight, matrix.qweight, "{n} x {k}");
        assert_eq!(back.group_params, matrix.group_params, "{n} x {k}");
    }
}

#[test]
fn gemm_words_hold_the_documented_order() {
    let matrix = random_matrix(7, 16, 32, 16);
    let tensors = awq::encode_gemm(&matrix).unwrap();
    for row in 0..matrix.n {
        let nibble = [0, 4, 1, 5, 2, 6, 3, 7][row % 8];
        for col in 0..matrix.k {
            let word = tensors.qweight[col * 2 + row / 8];
            assert_eq!((word >> (4 * nibble) & 15) as u8, matrix.code(row, col));
        }
        for group in 0..2 {
            let (scale, zero) = matrix.group(row, group);
            assert_eq!(tensors.qzeros[group * 2 + row / 8] >> (4 * nibble) & 15, zero.to_f32() as u32);
            assert_eq!(tensors.scales[group * 16 + row], scale);
        }
    }
}

#[test]
fn gemm_refuses_what_it_cannot_hold() {
    let mut bias = random_matrix(1, 8, 8, 8);
    bias.offset = Offset::Bias;
    let mut fraction = random_matrix(1, 8, 8, 8);
    fraction.group_params[3] = u32::from(f16::from_f32(7.5).to_bits()) << 16;
    let mut large = random_matrix(1, 8, 8, 8);
    large.group_params[3] = u32::from(f16::from_f32(16.0).to_bits()) << 16;
    for matrix in [bias, fraction, large, random_matrix(1, 12, 8, 8)] {
        assert_eq!(awq::encode_gemm(&matrix).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn weights_round_once_to_half_precision() {
    for offset in [Offset::Zero, Offset::Bias] {
        let mut matrix = random_matrix(11, 3, 64, 16);
        matrix.offset = offset;
        let mut row = vec![0.0; 64];
        for n in 0..3 {
            matrix.dequantize_row(n, &mut row);
            for (k, &w) in row.iter().enumerate() {
                let (s, o) = matrix.group(n, k / 16);
                let (q, s, o) = (f64::from(matrix.code(n, k)), s.to_f64(), o.to_f64());
                let exact = if offset == Offset::Zero { (q - o) * s } else { q * s + o };
                assert_eq!(w, f16::from_f64(exact).to_f32(), "row {n}, column {k}");
                assert_eq!(w, matrix.group_table(n, k / 16)[matrix.code(n, k) as usize]);
            }
        }
    }
}

fn dense(rows: &[&[f32]]) -> DenseMatrix {
    let bytes = rows.concat().iter().flat_map(|w| w.to_le_bytes()).collect();
    DenseMatrix::new(rows.len(), rows[0].len(), DenseType::F32, Bytes::owned(bytes)).unwrap()
}

#[test]
fn rounding_to_nearest_stays_within_half_a_step() {
    let weights: Vec<f32> = noise(5, 4 * 64 * 4)
        .chunks_exact(4)
        .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32 * 1e-10)
        .collect();
    // Signs: mixed, all positive, all negative, all zero.
    let rows: Vec<Vec<f32>> = vec![
        weights[..64].to_vec(),
        weights[64..128].iter().map(|w| w.abs() + 0.5).collect(),
        weights[128..192].iter().map(|w| -w.abs() - 0.5).collect(),
        vec![0.0; 64],
    ];
    let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    let matrix = quantize_matrix(&dense(&rows), 32).unwrap();
    let mut back = vec![0.0; 64];
    for (n, row) in rows.iter().enumerate() {
        matrix.dequantize_row(n, &mut back);
        for (k, (&w, &b)) in row.iter().zip(&back).enumerate() {
            let (s, z) = matrix.group(n, k / 32);
            assert!((0.0..=15.0).contains(&z.to_f32()) && z.to_f32().fract() == 0.0);
            // Half a step for the weight and half a step for the zero point, which is rounded too; f16 adds a little.
            assert!((w - b).abs() <= 1.02 * s.to_f32(), "row {n}, column {k}: {w} became {b}, step {s}");
        }
    }
    assert_eq!(back, [0.0; 64], "zero stays exactly zero");
}

#[test]
fn rounding_to_nearest_by_hand() {
    // Range -1 to 2: step 0.2 (f16: 0.199951), zero point 5; ties go to even.
    let row = [-1.0, 2.0, 0.0, 0.1, 0.2, 0.29, -0.31, 1.9];
    let matrix = quantize_matrix(&dense(&[&row]), 8).unwrap();
    assert_eq!(matrix.group(0, 0), (f16::from_f32(0.2), f16::from_f32(5.0)));
    let codes: Vec<u8> = (0..8).map(|k| matrix.code(0, k)).collect();
    assert_eq!(codes, [0, 15, 5, 6, 6, 6, 3, 15]);
}

#[test]
fn rounding_to_nearest_refuses_bad_weights() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
        let error = quantize_matrix(&dense(&[&[0.0; 8], &[0.0, 0.0, bad, 0.0, 0.0, 0.0, 0.0, 0.0]]), 8).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidTensor && error.message().contains("row 1"), "{error}");
    }
    for size in [0, 3, 12, 16] {
        assert_eq!(quantize_matrix(&dense(&[&[0.0; 8]]), size).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

/// Packs a fixture and returns the folder, its name and the report.
fn pack(source: &str, options: &RtnOptions) -> (Folder, PathBuf, Report) {
    let folder = Folder::new();
    let out = folder.path().join("packed");
    let mut last = 0;
    let report = quantize_rtn(&fixtures().join(source), &out, options, &mut |progress| {
        assert!(last <= progress.done && progress.done < progress.total);
        last = progress.done;
        Ok(())
    })
    .unwrap();
    (folder, out, report)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_dense_checkpoint_becomes_an_autoawq_one() {
    let (folder, out, report) = pack("formats/fp16", &RtnOptions::default());
    assert_eq!(names(folder.path()), ["packed"], "no temporary folder stays");
    assert_eq!(report.group_size, 128);
    assert_eq!(report.packed.len(), 14);
    for module in &report.packed {
        assert!((0.05..0.15).contains(&module.relative_error), "{module:?}");
    }
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.bytes_on_disk(), report.packed_bytes);
    assert_eq!(awqua::model::verify(&checkpoint).unwrap(), []);
    // Names, types and shapes are those that AutoAWQ itself writes for this model, only with another group size.
    let theirs = Checkpoint::open(&fixtures().join("formats/autoawq-gemm-g64")).unwrap();
    for (ours, theirs) in checkpoint.tensors().zip(theirs.tensors()) {
        assert_eq!((&ours.name, ours.dtype, ours.shape.last()), (&theirs.name, theirs.dtype, theirs.shape.last()));
    }
    assert_eq!(checkpoint.tensors().len(), theirs.tensors().len());
    let section = &checkpoint.config()["quantization_config"];
    assert_eq!(section["version"], "gemm");
    assert_eq!(section["modules_to_not_convert"], serde_json::Value::Null);
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(out.join(file).is_file(), "{file} was not copied");
    }
    // Every tensor lies at a multiple of its element size, as readers in other languages like it.
    let file = std::fs::read(out.join("model.safetensors")).unwrap();
    let header: serde_json::Value =
        serde_json::from_slice(&file[8..8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize]).unwrap();
    assert_eq!(header["__metadata__"]["format"], "pt");
    for (name, entry) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let size = if entry["dtype"] == "I32" { 4 } else { 2 };
        assert_eq!(entry["data_offsets"][0].as_u64().unwrap() % size, 0, "{name}");
    }
}

#[test]
fn packing_is_deterministic_and_shards_hold_the_same() {
    let options = RtnOptions { group_size: Some(32), rest: Rest::Keep, ..RtnOptions::default() };
    let (_a, a, _) = pack("arch/qwen2", &options);
    let (_b, b, _) = pack("arch/qwen2", &options);
    assert_eq!(names(&a), names(&b));
    for name in names(&a) {
        assert_eq!(std::fs::read(a.join(&name)).unwrap(), std::fs::read(b.join(&name)).unwrap(), "{name}");
    }
    let (_c, c, _) = pack("arch/qwen2", &RtnOptions { shard_bytes: 100_000, ..options });
    let shards = names(&c).into_iter().filter(|name| name.ends_with(".safetensors")).count();
    assert!(shards > 2 && c.join("model.safetensors.index.json").is_file(), "{:?}", names(&c));
    let (one, many) = (Checkpoint::open(&a).unwrap(), Checkpoint::open(&c).unwrap());
    assert_eq!(one.tensors().len(), many.tensors().len());
    for (x, y) in one.tensors().zip(many.tensors()) {
        assert_eq!(
            (&x.name, x.dtype, &x.shape, &*x.bytes().unwrap()),
            (&y.name, y.dtype, &y.shape, &*y.bytes().unwrap())
        );
    }
    let embedding = one.tensor("model.embed_tokens.weight").unwrap();
    let source = Checkpoint::open(&fixtures().join("arch/qwen2")).unwrap();
    let meant = source.tensor("model.embed_tokens.weight").unwrap().bytes().unwrap();
    assert_eq!(*embedding.bytes().unwrap(), *meant);
}

#[test]
fn packing_refuses_and_leaves_nothing_behind() {
    let folder = Folder::new();
    let out = folder.path().join("packed");
    let mut quiet = |_: Progress<'_>| Ok(());
    let fp16 = fixtures().join("formats/fp16");
    let default = RtnOptions::default();

    let packed = fixtures().join("formats/autoawq-gemm-g64");
    let error = quantize_rtn(&packed, &out, &default, &mut quiet).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);

    // 320 input features of down_proj.
    let wide = RtnOptions { group_size: Some(128), ..default.clone() };
    let error = quantize_rtn(&fixtures().join("arch/qwen2"), &out, &wide, &mut quiet).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(error.tensor(), Some("model.layers.0.mlp.down_proj.weight"));
    let odd = RtnOptions { group_size: Some(7), ..default.clone() };
    assert_eq!(quantize_rtn(&fp16, &out, &odd, &mut quiet).unwrap_err().kind(), ErrorKind::InvalidInput);

    let mut steps = 0;
    let error = quantize_rtn(&fp16, &out, &default, &mut |_| {
        steps += 1;
        if steps > 9 { Err(awqua::Error::new(ErrorKind::Cancelled, "stopped")) } else { Ok(()) }
    })
    .unwrap_err();
    assert_eq!((error.kind(), steps), (ErrorKind::Cancelled, 10));
    assert_eq!(names(folder.path()), Vec::<String>::new());

    std::fs::create_dir(&out).unwrap();
    quantize_rtn(&fp16, &out, &default, &mut quiet).unwrap();
    let before = names(&out);
    let error = quantize_rtn(&fp16, &out, &default, &mut quiet).unwrap_err();
    assert_eq!((error.kind(), error.file()), (ErrorKind::InvalidInput, Some(&*out)));
    assert_eq!(names(&out), before);
    assert_eq!(names(folder.path()), ["packed"]);
}
