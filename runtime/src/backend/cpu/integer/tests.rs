use half::f16;

use super::activations::place;
use super::rows::{BYTE_GROUP, Codes, OCTET, Shape};
use super::*;
use crate::backend::cpu::kernels;
use crate::quant::awq::encode_gemm;
use crate::tensor::{Offset, W4Matrix};

fn random(seed: &mut u64) -> u32 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*seed >> 32) as u32
}

fn float(seed: &mut u64) -> f32 {
    random(seed) as f32 / u32::MAX as f32 - 0.5
}

fn w4(n: usize, k: usize, group_size: usize, offset: Offset, seed: &mut u64) -> W4Matrix {
    let qweight = (0..n * k / 8).map(|_| random(seed)).collect();
    let group_params = (0..n * k / group_size)
        .map(|_| {
            let s = f16::from_f32(0.01 + random(seed) as f32 / 4e11);
            let o = match offset.is_bias() {
                true => f16::from_f32(0.08 * (float(seed) - 0.5)),
                false => f16::from_f32((random(seed) % 16) as f32),
            };
            u32::from(s.to_bits()) | u32::from(o.to_bits()) << 16
        })
        .collect();
    W4Matrix { n, k, group_size, qweight, group_params, offset }
}

/// A matrix in blocks, and what it stands for without rounding.
struct Case {
    shape: Shape,
    bytes: Vec<u8>,
    /// (n, k)
    weights: Vec<f64>,
}

impl Case {
    fn four(n: usize, k: usize, group_size: usize, offset: Offset, seed: &mut u64) -> Self {
        let matrix = w4(n, k, group_size, offset, seed);
        let shape = Shape::of_w4(n, k, group_size, offset).unwrap();
        let mut bytes = vec![0; shape.bytes().unwrap()];
        rows::interleave(&matrix, 0, &shape, &mut bytes);
        let weight = |i: usize| {
            let params = matrix.group_params[i / group_size];
            let (s, o) = (f16::from_bits(params as u16).to_f64(), f16::from_bits((params >> 16) as u16).to_f64());
            let q = f64::from(matrix.qweight[i / 8] >> (4 * (i % 8)) & 15);
            if offset.is_bias() { s * q + o } else { s * (q - o) }
        };
        Self { shape, bytes, weights: (0..n * k).map(weight).collect() }
    }

    fn eight(n: usize, k: usize, seed: &mut u64) -> Self {
        let shape = Shape::of_bytes(n, k).unwrap();
        let values: Vec<f32> = (0..n * k).map(|_| float(seed)).collect();
        let mut bytes = vec![0; shape.bytes().unwrap()];
        // In two pieces, as two tasks do it.
        let (first, second) = bytes.split_at_mut(shape.blocks() / 2 * shape.block_bytes());
        for (at, bytes) in [(0, first), (shape.blocks() / 2, second)] {
            rows::round(&kernels::Portable, &shape, at, bytes, |row, out| out.copy_from_slice(&values[row * k..][..k]));
        }
        let mut weights = vec![0.0; k];
        let mut all = Vec::new();
        for row in 0..n {
            Rows::new(shape, &bytes).expand(&kernels::Portable, row, 0, &mut weights);
            for (group, (found, given)) in
                weights.chunks(BYTE_GROUP).zip(values[row * k..][..k].chunks(BYTE_GROUP)).enumerate()
            {
                let largest = given.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                for (found, given) in found.iter().zip(given) {
                    assert!((found - given).abs() <= 0.51 * largest / 127.0, "row {row} group {group}");
                }
            }
            all.extend(weights.iter().map(|&v| f64::from(v)));
        }
        Self { shape, bytes, weights: all }
    }

    fn rows(&self) -> Rows<'_> {
        Rows::new(self.shape, &self.bytes)
    }
}

fn cases(seed: &mut u64) -> Vec<Case> {
    let mut cases = Vec::new();
    for offset in [Offset::Zero, Offset::RoundedBias] {
        for (n, k, group_size) in [
            (1, 32, 32),
            (5, 128, 32),
            (3, 1024, 512),
            (130, 576, 64),
            (330, 64, 64),
            (16, 896, 128),
            (18, 4864, 128),
            (6, 1536, 1536),
            (2, 2208, 2208),
            (33, 768, 384),
        ] {
            cases.push(Case::four(n, k, group_size, offset, seed));
        }
    }
    for (n, k) in [(1, 32), (40, 576), (17, 1184)] {
        cases.push(Case::eight(n, k, seed));
    }
    cases
}

/// Rows of activations as different as those of models: some large, some small, an outlier.
fn inputs(rows: usize, k: usize, seed: &mut u64) -> Vec<f32> {
    let mut x: Vec<f32> = (0..rows * k).map(|_| float(seed)).collect();
    for x in x.chunks_exact_mut(k) {
        x[k / 3] = 80.0;
        x[k / 2..k / 2 + 16].fill(0.0);
    }
    x
}

fn rounded(kernels: &dyn Kernels, shape: &Shape, x: &[f32]) -> Activations {
    let mut activations = Activations::with(x.len(), x.len() / BYTE_GROUP).unwrap();
    activations.round(&mut Pool::new(2), kernels, shape, x, x.len() / shape.k).unwrap();
    activations
}

#[test]
fn expansions_are_those_of_the_definition() {
    let mut seed = 8;
    for offset in [Offset::Zero, Offset::Bias, Offset::RoundedBias, Offset::ZeroBf16] {
        for (n, k, group_size) in [(19, 192, 64), (3, 320, 320), (2, 1536, 512)] {
            let matrix = w4(n, k, group_size, offset, &mut seed);
            let shape = Shape::of_w4(n, k, group_size, offset).unwrap();
            let mut bytes = vec![0; shape.bytes().unwrap()];
            rows::interleave(&matrix, 0, &shape, &mut bytes);
            let (mut expected, mut found) = (vec![0.0; k], vec![0.0; k]);
            for kernels in kernels::all() {
                for row in 0..n {
                    matrix.dequantize_row(row, &mut expected);
                    let (first, second) = found.split_at_mut(k / 16 * 8);
                    Rows::new(shape, &bytes).expand(&*kernels, row, 0, first);
                    Rows::new(shape, &bytes).expand(&*kernels, row, first.len(), second);
                    assert_eq!(found, expected, "{} row {row} of {shape:?}", kernels.name());
                }
                let mut block = vec![0.0; LANES * k];
                for first in (0..n).step_by(LANES) {
                    let (left, right) = block.split_at_mut(LANES * (k / 16 * 8));
                    let rows = Rows::new(shape, &bytes);
                    rows.expand_block(&*kernels, first / LANES, 0, left);
                    rows.expand_block(&*kernels, first / LANES, left.len() / LANES, right);
                    for row in first..n.min(first + LANES) {
                        matrix.dequantize_row(row, &mut expected);
                        let found: Vec<f32> = block.iter().skip(row % LANES).step_by(LANES).copied().collect();
                        assert_eq!(found, expected, "{} row {row} of {shape:?}", kernels.name());
                    }
                }
            }
        }
    }
}

#[test]
fn rows_may_come_in_parts() {
    let mut seed = 15;
    let (n, k, group_size) = (72, 192, 64);
    let matrix = w4(n, k, group_size, Offset::Zero, &mut seed);
    let shape = Shape::of_w4(n, k, group_size, Offset::Zero).unwrap();
    let mut whole = vec![0; shape.bytes().unwrap()];
    rows::interleave(&matrix, 0, &shape, &mut whole);
    let stored = encode_gemm(&matrix).unwrap();
    for cuts in [vec![0, 72], vec![0, 8, 16, 40, 72], vec![0, 24, 56, 72]] {
        let (mut bytes, mut straight) = (vec![0; whole.len()], vec![0; whole.len()]);
        for rows in cuts.windows(2).map(|cut| cut[0]..cut[1]) {
            let (words, groups) = (k / 8, k / group_size);
            let part = W4Matrix {
                n: rows.len(),
                qweight: matrix.qweight[rows.start * words..rows.end * words].to_vec(),
                group_params: matrix.group_params[rows.start * groups..rows.end * groups].to_vec(),
                ..matrix
            };
            rows::interleave(&part, rows.start, &shape, &mut bytes);
            let part = encode_gemm(&part).unwrap();
            for inputs in [0..128, 128..k] {
                let pieces = stored::Pieces::of(&part, inputs, rows.len(), group_size);
                for block in rows.start / LANES..rows.end.div_ceil(LANES) {
                    let bytes = &mut straight[block * shape.block_bytes()..][..shape.block_bytes()];
                    pieces.lay_out(block * LANES, rows.start, &shape, bytes);
                }
            }
        }
        assert_eq!(bytes, whole);
        assert_eq!(straight, whole);
    }
    let mut straight = vec![0; whole.len()];
    stored::Pieces::of(&stored, 0..k, n, group_size).lay_out(0, 0, &shape, &mut straight);
    assert_eq!(straight, whole);
}

#[test]
fn groups_are_rounded_alike() {
    let mut seed = 5;
    for magnitude in [1.0, 3e4, 1e-5, 1e-7] {
        let stride = BYTE_GROUP + 3;
        let mut values: Vec<f32> = (0..LANES * stride).map(|_| magnitude * float(&mut seed)).collect();
        values[3 * stride..][..BYTE_GROUP].fill(0.0);
        let mut expected = vec![1; (2 + BYTE_GROUP) * LANES];
        rows::round_group(&values, stride, &mut expected);
        for kernels in kernels::all() {
            let mut found = vec![2; expected.len()];
            kernels.round_group(&values, stride, &mut found);
            assert_eq!(found, expected, "{} at {magnitude}", kernels.name());
        }
    }
}

#[test]
fn rounding_keeps_what_it_promises() {
    let mut seed = 11;
    for span in [32, 64, 96, 192, 256] {
        for magnitude in [1e-20, 1.0, 3e30] {
            let mut x = inputs(1, span, &mut seed);
            x.iter_mut().for_each(|v| *v *= magnitude);
            let mut codes = vec![0; span];
            let (scale, sum) = portable::round_span(&x, &mut codes);
            let mut total = 0i64;
            for (i, &v) in x.iter().enumerate() {
                let code = codes[i / OCTET * OCTET + place(i % OCTET)];
                total += i64::from(code);
                assert!((scale * f32::from(code) - v).abs() <= 0.502 * scale, "{v} became {code} times {scale}");
            }
            assert_eq!(sum, scale * total as f32);
            for kernels in kernels::all() {
                let mut found = vec![1; span];
                let numbers = kernels.round_span(&x, &mut found);
                assert_eq!(numbers, (scale, sum), "{}", kernels.name());
                assert_eq!(kernels.natural(&found), codes, "{}", kernels.name());
            }
        }
    }
}

#[test]
fn rounding_of_zeros_and_of_what_is_no_number() {
    for kernels in kernels::all() {
        let mut codes = [5; 64];
        assert_eq!(kernels.round_span(&[0.0; 64], &mut codes), (0.0, 0.0));
        assert_eq!(codes, [0; 64]);
        assert_eq!(kernels.round_span(&[1e-40; 64], &mut codes), (0.0, 0.0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 64];
            x[37] = bad;
            assert!(!kernels.round_span(&x, &mut codes).0.is_finite(), "{}", kernels.name());
        }
    }
}

/// With scales of 1 and without offsets a product is its integer sum, which every kernel must compute exactly, the
/// largest possible one included.
#[test]
fn integer_sums_are_exact() {
    for kernels in kernels::all() {
        for span in [32, 64, 96, 256] {
            let shape = Shape { n: LANES, k: span, group_size: span, codes: Codes::Four(Offset::Bias) };
            for sign in [1.0, -1.0] {
                let mut bytes = vec![0xff; shape.bytes().unwrap()];
                for pair in bytes[..4 * LANES].chunks_exact_mut(2) {
                    pair.copy_from_slice(&f16::ZERO.to_bits().to_ne_bytes());
                }
                for pair in bytes[..2 * LANES].chunks_exact_mut(2) {
                    pair.copy_from_slice(&f16::ONE.to_bits().to_ne_bytes());
                }
                // One row, and as many as may be split into planes; the largest code, and the one whose low byte is -128.
                for (rows, code) in [1, 21].into_iter().flat_map(|rows| [(rows, 32639.0), (rows, 32384.0)]) {
                    let mut x = vec![sign * code; rows * span];
                    x.iter_mut().step_by(span).for_each(|x| *x = sign * 32639.0);
                    let activations = rounded(&*kernels, &shape, &x);
                    let x = activations.inputs();
                    assert_eq!(x.scales, vec![1.0; rows]);
                    let sum = f64::from(code) * (span - 1) as f64 + 32639.0;
                    let expected = [sign * (15.0 * sum) as f32; LANES];
                    let mut worker = Worker::new(span).unwrap();
                    let sums = worker.products(&*kernels, &Rows::new(shape, &bytes), 0..1, &x);
                    assert_eq!(sums, vec![expected; rows], "{} {rows} rows", kernels.name());
                    if rows == 1 {
                        let mut found = [[0.0; LANES]];
                        let x = worker.row(&*kernels, shape.codes, x);
                        kernels.gemv(&Rows::new(shape, &bytes), 0, 1, &x, &mut found);
                        assert_eq!(found, [expected], "{}", kernels.name());
                    }
                }
            }
        }
    }
}

/// Rounded activations from their planes.
fn joined(codes: &[i16], span: usize) -> Vec<i16> {
    let columns = if span.is_multiple_of(64) { 64 } else { 32 };
    let mut joined = Vec::new();
    for codes in codes.chunks_exact(columns) {
        let bytes: &[u8] = bytemuck::cast_slice(codes);
        let mut columns = vec![0; columns];
        for (i, column) in columns.iter_mut().enumerate() {
            let octet = i / OCTET * OCTET;
            let at = octet + [0, 4, 1, 5, 2, 6, 3, 7][i % OCTET];
            let code = i16::from(bytes[at]) | i16::from(bytes[codes.len() + at]) << 8;
            *column = code;
        }
        for octet in columns.as_chunks::<OCTET>().0 {
            let mut pairs = [0; OCTET];
            octet.iter().enumerate().for_each(|(column, code)| pairs[place(column)] = *code);
            joined.extend(pairs);
        }
    }
    joined
}

/// Processors without VNNI have the instructions that split a row for it, too.
#[cfg(target_arch = "x86_64")]
#[test]
fn bytes_of_a_row_are_its_codes() {
    let Some(kernels) = crate::backend::cpu::x86::Avx2::new() else { return };
    let mut seed = 23;
    for k in [32, 96, 576] {
        let mut codes: Vec<i16> = (0..k).map(|_| (random(&mut seed) % 65279) as i16).collect();
        codes.iter_mut().for_each(|code| *code = (*code).clamp(-32639, 32639));
        codes[..6].copy_from_slice(&[32639, -32639, 32384, 127, 128, -129]);
        let mut bytes = vec![0; 2 * k];
        kernels.split_row(&codes, &mut bytes);
        for (codes, bytes) in codes.as_chunks::<OCTET>().0.iter().zip(bytes.as_chunks::<{ 2 * OCTET }>().0) {
            for column in 0..OCTET {
                let at = OCTET / 2 * (column % 2) + column / 2;
                let (low, high) = (i32::from(bytes[at]), i32::from(bytes[OCTET + at]));
                assert_eq!(256 * high + low, i32::from(codes[place(column)]), "column {column} of {k}");
            }
        }
    }
}

/// What the rounded activations stand for, times the unrounded weights, for each row of the matrix.
fn expected(case: &Case, kernels: &dyn Kernels, x: &Inputs<'_>, t: usize) -> Vec<f64> {
    let k = case.shape.k;
    let codes = kernels.natural(&x.codes[t * k..][..k]);
    let codes = if x.planes { joined(&codes, x.span) } else { codes };
    let value = |i: usize| {
        let code = codes[i / OCTET * OCTET + place(i % OCTET)];
        f64::from(x.scales[(t * k + i) / x.span]) * f64::from(code)
    };
    let x: Vec<f64> = (0..k).map(value).collect();
    case.weights.chunks(k).map(|row| row.iter().zip(&x).map(|(w, x)| w * x).sum()).collect()
}

#[test]
fn products_match_f64_whatever_is_computed_together() {
    const ROWS: usize = 37;
    let mut seed = 3;
    for case in cases(&mut seed) {
        let Shape { n, k, .. } = case.shape;
        let x = inputs(ROWS, k, &mut seed);
        let bias: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let stride = n + 3;
        for kernels in kernels::all() {
            let mut alone: Vec<f32> = Vec::new();
            for (threads, tokens) in [(1, 1), (3, 1), (1, 2), (2, 3), (1, 5), (3, ROWS)] {
                let mut pool = Pool::new(threads);
                let workers: Vec<_> = (0..threads).map(|_| Mutex::new(Worker::new(k).unwrap())).collect();
                for first in (0..ROWS - tokens + 1).step_by(tokens) {
                    let activations = rounded(&*kernels, &case.shape, &x[first * k..][..tokens * k]);
                    let x = activations.inputs();
                    let mut out = vec![1.0; tokens * stride];
                    // In two pieces, as a deadline may part it.
                    let half = case.shape.blocks() / 2;
                    for part in [0..half, half..usize::MAX] {
                        let groups = [Group { expert: 0, rows: 0..tokens }];
                        let target = Target { out: &mut out, stride, bias: Some(&bias), accumulate: true, order: None };
                        matmul(&mut pool, &workers, &*kernels, &x, &[case.rows()], &groups, part, target).unwrap();
                    }
                    for t in 0..tokens {
                        let found = &out[t * stride..][..n];
                        if threads == 1 && tokens == 1 {
                            for (r, expected) in expected(&case, &*kernels, &x, t).into_iter().enumerate() {
                                let expected = expected + r as f64 + 1.0;
                                assert!(
                                    (f64::from(found[r]) - expected).abs() < 2e-5 * (1.0 + expected.abs()),
                                    "{} {:?} row {r}: {} != {expected}",
                                    kernels.name(),
                                    case.shape,
                                    found[r]
                                );
                            }
                            alone.extend_from_slice(found);
                        }
                        assert_eq!(found, &alone[(first + t) * n..][..n], "{} {tokens} tokens", kernels.name());
                        assert!(out[t * stride + n..(t + 1) * stride].iter().all(|&v| v == 1.0));
                    }
                }
            }
        }
    }
}

/// As many rows as caches make several pieces of, and experts with a row or a few beside such; some of one block, some of
/// several threads' worth.
#[test]
fn long_inputs_are_computed_in_pieces() {
    let mut seed = 17;
    for (n, k, group_size) in [(5, 64, 64), (150, 64, 32), (87, 2048, 128)] {
        let experts = [(); 3].map(|()| Case::four(n, k, group_size, Offset::Zero, &mut seed));
        let matrices = experts.each_ref().map(Case::rows);
        let rows = 2 * MAX_TOKENS + 9;
        let x = inputs(rows, k, &mut seed);
        let groups = [(1, 0..1), (0, 1..rows - 3), (2, rows - 3..rows)].map(|(expert, rows)| Group { expert, rows });
        for kernels in kernels::all() {
            let activations = rounded(&*kernels, &experts[0].shape, &x);
            let mut all = Vec::new();
            for threads in [1, 3] {
                let mut pool = Pool::new(threads);
                let workers: Vec<_> = (0..threads).map(|_| Mutex::new(Worker::new(k).unwrap())).collect();
                let mut out = vec![f32::NAN; rows * n];
                let target = Target { out: &mut out, stride: n, bias: None, accumulate: false, order: None };
                let x = activations.inputs();
                matmul(&mut pool, &workers, &*kernels, &x, &matrices, &groups, 0..usize::MAX, target).unwrap();
                all.push(out);
            }
            assert_eq!(all[0], all[1], "{}", kernels.name());
            for group in &groups {
                for row in group.rows.clone().step_by(1 + group.rows.len() / 9) {
                    let expected = expected(&experts[group.expert], &*kernels, &activations.inputs(), row);
                    for (found, expected) in all[0][row * n..][..n].iter().zip(expected) {
                        let close = (f64::from(*found) - expected).abs() < 2e-5 * (1.0 + expected.abs());
                        assert!(close, "{} row {row}: {found} {expected}", kernels.name());
                    }
                }
            }
        }
    }
}

/// A thread that computed with tiles has no state of them afterwards, so that a host's thread is as it was.
#[cfg(target_arch = "x86_64")]
#[test]
fn no_tile_is_left_in_use() {
    let mut seed = 4;
    let case = Case::four(40, 192, 64, Offset::Zero, &mut seed);
    let x = inputs(37, 192, &mut seed);
    for kernels in kernels::all().into_iter().filter(|kernels| kernels.takes_planes(37)) {
        let activations = rounded(&*kernels, &case.shape, &x);
        Worker::new(192).unwrap().products(&*kernels, &case.rows(), 0..3, &activations.inputs());
        assert_eq!(amx::in_use(), Some(false), "{}", kernels.name());
    }
}

#[test]
fn experts_take_the_rows_that_are_theirs() {
    let mut seed = 21;
    let (n, k) = (10, 128);
    let experts: Vec<Case> = (0..3).map(|_| Case::four(n, k, 64, Offset::Zero, &mut seed)).collect();
    let matrices: Vec<_> = experts.iter().map(Case::rows).collect();
    let x = inputs(7, k, &mut seed);
    let groups = [(2, 0..1), (0, 1..6), (1, 6..7)].map(|(expert, rows)| Group { expert, rows });
    let order = [3, 0, 6, 5, 1, 2, 4];
    let mut pool = Pool::new(2);
    let workers: Vec<_> = (0..2).map(|_| Mutex::new(Worker::new(k).unwrap())).collect();
    for kernels in kernels::all() {
        let activations = rounded(&*kernels, &experts[0].shape, &x);
        let x = activations.inputs();
        let mut out = vec![f32::NAN; 7 * n];
        let target = Target { out: &mut out, stride: n, bias: None, accumulate: false, order: Some(&order) };
        matmul(&mut pool, &workers, &*kernels, &x, &matrices, &groups, 0..9, target).unwrap();
        for group in &groups {
            for row in group.rows.clone() {
                let expected = expected(&experts[group.expert], &*kernels, &x, row);
                for (found, expected) in out[order[row] * n..][..n].iter().zip(expected) {
                    assert!((f64::from(*found) - expected).abs() < 2e-5 * (1.0 + expected.abs()), "{found} {expected}");
                }
            }
        }
    }
}

#[test]
fn other_matrices_are_left_to_the_exact_path() {
    for (k, group_size) in [(72, 8), (344, 344), (96, 48)] {
        assert!(Shape::of_w4(2, k, group_size, Offset::Zero).is_none());
    }
    assert!(Shape::of_w4(2, 64, 32, Offset::ZeroBf16).is_none());
    assert!(Shape::of_bytes(5, 72).is_none());
}
