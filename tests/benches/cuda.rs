//! Speed of the CUDA kernels on this machine's device: medians of graph replays over data that no cache holds.
//!
//! `cargo bench -p awqua-tests --no-default-features --features cuda --bench cuda [part...]`, parts: `copy`, `gemv`,
//! `dense`, `gemm`, `attention`, `stage`, `token`; all of them if none is named. What is right is the tests' business
//! (`AWQUA_CUDA_DEVICE=1 cargo test -p awqua-tests --features cuda --test cuda_kernels`).
#![allow(clippy::print_stdout, reason = "a benchmark prints its numbers")]

use std::time::Instant;

use awqua::backend::cuda::driver::{Buffer, Launch, OtherRows, Rows};
use awqua::backend::cuda::{CudaBackend, CudaOptions};
use awqua::backend::{AttentionShape, Backend, Budget, LogitsRows, Progress, Runner, RunnerConfig, Step};
use awqua::session::sampler::{SampleRequest, Sampling};
use awqua::tensor::{DenseType, Offset};
use awqua_shaders::Rng;
use awqua_shaders::cuda::{
    self, AttentionArgs, AttentionCoopArgs, CHUNK, GemmArgs, GemvDenseArgs, GemvW4Args, Product, Row, STAGE, StageArgs,
};
use awqua_tests::cuda::{Device, Packed, random_matrix};
use awqua_tests::decoder::{Case, Projection, build, cases, rope_rows};

/// Bytes that no cache holds.
const COLD: usize = 400 << 20;
/// (N, K) of the matrices of a 7B model: O, down, QKV, gate and up.
const SHAPES: [(usize, usize); 4] = [(4096, 4096), (4096, 11008), (12288, 4096), (22016, 4096)];

/// Name and measurements.
type Part = (&'static str, fn(&Bench));

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|w| w == part);
    if awqua::backend::cuda::devices().is_empty() {
        println!("no CUDA device");
        return;
    }
    let bench = Bench { device: Device::open(), rng: Rng::new(1).into(), copy: f64::NAN.into() };
    println!("{:?}", bench.device.gpu.summary);
    bench.copy();
    let parts: [Part; 6] = [
        ("gemv", Bench::gemv),
        ("dense", Bench::dense),
        ("gemm", Bench::gemm),
        ("attention", Bench::attention),
        ("stage", Bench::stage),
        ("token", Bench::token),
    ];
    for (name, part) in parts {
        if wants(name) {
            let start = Instant::now();
            part(&bench);
            println!("# {name}: {:.1} s", start.elapsed().as_secs_f64());
        }
    }
}

struct Bench {
    device: Device,
    rng: std::cell::RefCell<Rng>,
    /// Bytes a second of a copy, read and written.
    copy: std::cell::Cell<f64>,
}

impl Bench {
    /// Median seconds of one launch out of a graph of all of `launches`, with and without overlap of neighbours.
    fn time(&self, launches: &[Launch], overlaps: bool) -> f64 {
        let stream = &self.device.stream;
        let launches: Vec<Launch> = launches.iter().map(|l| Launch { overlaps, ..l.clone() }).collect();
        let graph = stream
            // SAFETY: the callers keep the buffers of the launches.
            .capture(|| launches.iter().try_for_each(|launch| unsafe { stream.launch(launch) }))
            .expect("the graph is recorded");
        let (begin, end) = (self.device.gpu.event().expect("an event"), self.device.gpu.event().expect("an event"));
        let once = || {
            stream.record(&begin).expect("recorded");
            stream.launch_graph(&graph).expect("started");
            stream.record(&end).expect("recorded");
            end.wait().expect("the device ends");
            begin.seconds_to(&end).expect("times")
        };
        let first = once();
        // As many as fit a tenth of a second, at least five.
        let rounds = ((0.1 / first.max(1e-6)) as usize).clamp(5, 50);
        let mut times: Vec<f64> = (0..rounds).map(|_| once()).collect();
        times.sort_by(f64::total_cmp);
        times[rounds / 2] / launches.len() as f64
    }

    fn report(&self, label: &str, seconds: f64, bytes: f64, flops: f64) {
        println!(
            "{label:<58} {:>9.2} us {:>7.0} GB/s {:>5.1} % of copy {:>7.1} TFLOP/s",
            seconds * 1e6,
            bytes / seconds / 1e9,
            bytes / seconds / self.copy.get() * 100.0,
            flops / seconds / 1e12
        );
    }

    fn copy(&self) {
        let bytes = 1usize << 30;
        let (from, to) = (self.device.zeros(bytes), self.device.zeros(bytes));
        let (begin, end) = (self.device.gpu.event().expect("an event"), self.device.gpu.event().expect("an event"));
        let mut times: Vec<f64> = (0..15)
            .map(|_| {
                self.device.stream.record(&begin).expect("recorded");
                let mib = 1 << 20;
                let rows =
                    Rows { offset: 0, width: mib, rows: bytes >> 20, pitch: mib, other_offset: 0, other_pitch: mib };
                self.device.stream.copy_rows(&from, rows, OtherRows::Device(&to)).expect("copied");
                self.device.stream.record(&end).expect("recorded");
                end.wait().expect("the device ends");
                begin.seconds_to(&end).expect("times")
            })
            .collect();
        times.sort_by(f64::total_cmp);
        self.copy.set(2.0 * bytes as f64 / times[7]);
        println!("copy of 1 GiB: {:.0} GB/s read and written", self.copy.get() / 1e9);
    }

    /// Copies of a random matrix that no cache holds.
    fn matrices(&self, n: usize, k: usize) -> Vec<Packed> {
        let one = random_matrix(n, k, 128, Offset::Zero, false, &mut self.rng.borrow_mut());
        let count = (COLD / (n * k / 2)).max(2);
        (0..count).map(|_| Packed::new(&self.device, one.clone())).collect()
    }

    fn random_halves(&self, n: usize) -> Buffer {
        let mut rng = self.rng.borrow_mut();
        let values: Vec<u16> = (0..n).map(|_| half::f16::from_f32(rng.range(-1.0, 1.0)).to_bits()).collect();
        self.device.upload(&values)
    }

    fn gemv(&self) {
        println!("\nrows of packed matrices, group 128");
        for (n, k) in SHAPES {
            let all = self.matrices(n, k);
            let x = self.device.upload(&self.rng.borrow_mut().values(k, 1.0));
            let norm = self.device.upload(&vec![1.0f32; k]);
            let half_x = self.random_halves(16 * k);
            let out = self.device.zeros(16 * n * 4);
            let bytes = (all[0].codes.bytes() + all[0].params.bytes()) as f64;
            let stages = (k as u32).div_ceil(STAGE);
            // One row comes through a norm, or in half precision as behind attention.
            for (tokens, name, at_once, through_norm) in [
                (1, "gemv_w4_1_128", 1, true),
                (1, "gemv_w4_1_128", 1, false),
                (8, "gemv_w4_8_128", 8, false),
                (16, "gemv_w4_16_128", 16, false),
            ] {
                for (warps, overlaps) in [(4, true), (8, true), (12, true), (16, true), (8, false)] {
                    let shared = cuda::gemv_shared(at_once, 1, warps, stages);
                    if shared > self.device.gpu.limits.shared {
                        continue;
                    }
                    // Enough that the ends of a graph do not count.
                    let launches: Vec<Launch> = all
                        .iter()
                        .cycle()
                        .take(all.len().max(64))
                        .map(|w| {
                            let product = Product {
                                out: out.address(),
                                out_stride: n as u32,
                                target: cuda::TO_ROWS,
                                ..w.product()
                            };
                            let arguments = GemvW4Args {
                                product,
                                x: if through_norm { x.address() } else { 0 },
                                half_x: half_x.address(),
                                norm: norm.address(),
                                eps: 1e-5,
                                k: k as u32,
                                x_stride: k as u32,
                                tokens,
                            };
                            let grid = [product.pairs, 1, 1];
                            Launch::new(self.device.function(name), grid, warps * 32, shared, &arguments)
                        })
                        .collect();
                    let seconds = self.time(&launches, overlaps);
                    let flops = 2.0 * (n * k) as f64 * f64::from(tokens);
                    let of = if through_norm { ", through a norm" } else { "" };
                    let way = if overlaps { "" } else { ", no overlap" };
                    let label = format!("{n} x {k}, M {tokens}{of}, {warps} warps{way}");
                    self.report(&label, seconds, bytes, flops);
                }
            }
        }
    }

    fn dense(&self) {
        println!("\nrows of dense matrices");
        let (n, k) = (32000, 4096);
        let all: Vec<Buffer> = (0..2).map(|_| self.random_halves(n * k)).collect();
        let x = self.device.upload(&self.rng.borrow_mut().values(k, 1.0));
        let norm = self.device.upload(&vec![1.0f32; k]);
        let half_x = self.random_halves(8 * k);
        let out = self.device.zeros(8 * n * 4);
        for (tokens, name) in [(1, "gemv_dense_1"), (8, "gemv_dense_8")] {
            for per_processor in [1, 2, 3] {
                let launches: Vec<Launch> = all
                    .iter()
                    .map(|w| {
                        let arguments = GemvDenseArgs {
                            w: w.address(),
                            x: x.address(),
                            half_x: half_x.address(),
                            norm: norm.address(),
                            out: out.address(),
                            eps: 1e-5,
                            n: n as u32,
                            k: k as u32,
                            stride: k as u32,
                            x_stride: k as u32,
                            out_stride: n as u32,
                            tokens,
                            scale: 1.0,
                            ..Default::default()
                        };
                        let shared = cuda::gemv_dense_shared(tokens, k as u32);
                        let grid = [per_processor * self.device.gpu.limits.multiprocessors, 1, 1];
                        Launch::new(self.device.function(name), grid, 256, shared, &arguments)
                    })
                    .collect();
                let seconds = self.time(&launches, true);
                let label = format!("{n} x {k}, M {tokens}, {per_processor} blocks a multiprocessor");
                self.report(&label, seconds, (n * k * 2) as f64, 2.0 * (n * k) as f64 * f64::from(tokens));
            }
        }
    }

    fn gemm(&self) {
        println!("\nmany rows of packed matrices, group 128");
        let limits = self.device.gpu.limits;
        let mut kernels = vec![
            ("gemm_w4_8", 8, 64, cuda::GEMM_WARPS * 32, cuda::gemm_shared(8)),
            ("gemm_w4_2", 2, 64, cuda::GEMM_WARPS * 32, cuda::gemm_shared(2)),
        ];
        if limits.capability == (9, 0) {
            let (pairs, threads) = (cuda::COOP_PAIRS, cuda::COOP_THREADS);
            kernels.push(("gemm_w4_coop_128", pairs, 128, threads, cuda::gemm_coop_shared(128)));
            kernels.push(("gemm_w4_coop_64", pairs, 64, threads, cuda::gemm_coop_shared(64)));
        }
        kernels.retain(|(.., shared)| *shared <= limits.shared);
        for (n, k) in SHAPES {
            let all: Vec<Packed> = self.matrices(n, k).into_iter().take(4).collect();
            let x = self.random_halves(2048 * k);
            let out = self.device.zeros(2048 * n * 4);
            for tokens in [64u32, 128, 512, 2048] {
                for &(name, pairs, at_once, threads, shared) in &kernels {
                    let launches: Vec<Launch> = all
                        .iter()
                        .map(|w| {
                            let product = Product {
                                out: out.address(),
                                out_stride: n as u32,
                                target: cuda::TO_ROWS,
                                ..w.product()
                            };
                            let arguments = GemmArgs { product, x: x.address(), dense: 0, tokens, pad: 0 };
                            let grid = [tokens.div_ceil(at_once), product.pairs.div_ceil(pairs), 1];
                            Launch::new(self.device.function(name), grid, threads, shared, &arguments)
                        })
                        .collect();
                    let seconds = self.time(&launches, true);
                    let bytes = (all[0].codes.bytes() + all[0].params.bytes()) as f64;
                    let flops = 2.0 * (n * k) as f64 * f64::from(tokens);
                    self.report(&format!("{n} x {k}, M {tokens}, {name}"), seconds, bytes, flops);
                }
            }
        }
    }

    fn attention(&self) {
        println!("\nattention, heads of 128");
        let limits = self.device.gpu.limits;
        let shapes = [(32usize, 32usize, false), (32, 8, false), (32, 32, true), (32, 8, true)];
        for (heads, kv_heads, q8) in shapes {
            for context in [128usize, 2048, 8192] {
                let row_bytes = if q8 { 128 + cuda::scale_bytes(128) as usize } else { 256 };
                let layers = (COLD / (kv_heads * context * 2 * row_bytes)).clamp(1, 32);
                let cache = self.random_halves(layers * kv_heads * context * row_bytes);
                let (all, position) = (context as u32, context as u32 - 1);
                let row = Row { cache: cache.address(), context: all, position, own: all, ..Default::default() };
                let rows = self.device.upload(&[row]);
                let q = self.random_halves(heads * 128);
                let out = self.device.zeros(heads * 128 * 2);
                for blocks in [1, 2, 4] {
                    let splits = (blocks * limits.multiprocessors).div_ceil(kv_heads as u32).clamp(1, 64);
                    let partial = self.device.zeros(heads * splits as usize * 128 * 4);
                    let weights = self.device.zeros(heads * splits as usize * 8);
                    let arrived = self.device.zeros(kv_heads * 4);
                    let launches: Vec<Launch> = (0..layers as u32)
                        .map(|layer| {
                            let arguments = AttentionArgs {
                                q: q.address(),
                                rows: rows.address(),
                                out: out.address(),
                                partial: partial.address(),
                                weights: weights.address(),
                                arrived: arrived.address(),
                                q_stride: heads as u32 * 128,
                                out_stride: heads as u32 * 128,
                                out_tiled: 0,
                                heads: heads as u32,
                                kv_heads: kv_heads as u32,
                                layer,
                                window: 0,
                                scale: 0.1,
                                cap: 0.0,
                                layers: layers as u32,
                            };
                            let grid = [splits, kv_heads as u32, 1];
                            let shared = cuda::attention_shared(128, q8);
                            let name = if q8 { "attention_q8_128" } else { "attention_128" };
                            Launch::new(self.device.function(name), grid, 128, shared, &arguments)
                        })
                        .collect();
                    let seconds = self.time(&launches, true);
                    let bytes = (2 * kv_heads * context * row_bytes) as f64;
                    let kv = if q8 { "8 bits" } else { "f16" };
                    let label = format!("one token at {context}, {heads}/{kv_heads} heads, {kv}, {splits} splits");
                    self.report(&label, seconds, bytes, 4.0 * (heads * context * 128) as f64);
                }
            }
        }
        for (heads, kv_heads, q8) in shapes {
            let tokens = 2048;
            let cache = self.random_halves(2 * kv_heads * tokens * 128);
            let (cache, context) = (cache.address(), tokens as u32);
            let row = |position| Row { cache, context, position, own: context, ..Default::default() };
            let rows: Vec<Row> = (0..context).map(row).collect();
            let rows = self.device.upload(&rows);
            let q = self.random_halves(tokens * heads * 128);
            let out = self.device.zeros(tokens * heads * 128 * 2);
            let arguments = AttentionCoopArgs {
                q: q.address(),
                rows: rows.address(),
                out: out.address(),
                tokens: tokens as u32,
                q_stride: heads as u32 * 128,
                out_stride: heads as u32 * 128 / CHUNK,
                out_tiled: 1,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                layer: 0,
                window: 0,
                scale: 0.1,
                cap: 0.0,
                layers: 1,
                pad: 0,
            };
            let grid = [(tokens as u32).div_ceil(cuda::COOP_TOKENS), heads as u32, 1];
            let function = self.device.function(if q8 { "attention_coop_q8_128" } else { "attention_coop_128" });
            let launch = Launch::new(function, grid, 256, cuda::attention_coop_shared(128), &arguments);
            let seconds = self.time(&[launch.clone(), launch], true);
            let label = format!("{tokens} tokens, {heads}/{kv_heads} heads, {}", if q8 { "8 bits" } else { "f16" });
            // Half of the scores are seen.
            self.report(&label, seconds, 0.0, 2.0 * (heads * tokens * tokens * 128) as f64);
        }
    }

    fn stage(&self) {
        println!("\ninputs through a norm");
        let (tokens, k) = (2048, 4096);
        let x = self.device.upload(&self.rng.borrow_mut().values(tokens * k, 1.0));
        let norm = self.device.upload(&vec![1.0f32; k]);
        let out = self.device.zeros(tokens * k * 2);
        let arguments = StageArgs {
            x: x.address(),
            norm: norm.address(),
            out: out.address(),
            slots: 0,
            eps: 1e-5,
            k: k as u32,
            x_stride: k as u32,
            first_row: 0,
            out_stride: k as u32 / CHUNK,
            out_tiled: 1,
            share: 0,
            pad: 0,
        };
        let function = self.device.function("stage");
        let launch = Launch::new(function, [tokens as u32, 1, 1], 256, cuda::BLOCK_SUM_SHARED, &arguments);
        let seconds = self.time(&[launch.clone(), launch], true);
        self.report(&format!("{tokens} tokens of {k}"), seconds, (tokens * k * 6) as f64, 0.0);
    }

    /// Tokens of a model of two layers of 7B, whose packed matrices take about 70 us by themselves: what the steps cost
    /// alone, choices alone, and both together, kernel by kernel and as a graph.
    fn token(&self) {
        println!("\ntokens of two layers of 7B, by the clock of the host");
        let case = Case {
            hidden: 4096,
            ffn: 11008,
            vocab: 32000,
            layers: 2,
            shape: AttentionShape { heads: 32, kv_heads: 32, head_dim: 128, rotary_dim: 128 },
            projections: Projection::W4 { group_size: 128, offset: Offset::Zero },
            embedding: DenseType::F16,
            head: Projection::Dense(DenseType::F16),
            ..cases().swap_remove(0)
        };
        let model = build(&case);
        const TOKENS: u32 = 200;
        let show = |label: &str, start: Instant| {
            println!("{label:<58} {:>9.2} us", start.elapsed().as_secs_f64() * 1e6 / f64::from(TOKENS));
        };
        for force_no_graphs in [false, true] {
            let mut backend =
                CudaBackend::open(&CudaOptions { force_no_graphs, ..CudaOptions::default() }).expect("opens");
            for (i, weight) in model.weights.iter().enumerate() {
                backend.upload(&format!("weight {i}"), weight.clone()).expect("the weight fits");
            }
            let config = RunnerConfig {
                max_tokens: 8,
                max_logits_rows: 1,
                context: awqua_tests::decoder::CONTEXT,
                kv_type: None,
                threads: None,
                jobs: None,
                share_forks: false,
                exact: true,
            };
            let mut runner = std::sync::Arc::new(backend).runner(&model.program, &config).expect("the runner fits");
            for table in 0..model.program.rope_tables {
                runner.write_rope(table, 0, &rope_rows(table, 64)).expect("rows fit");
            }
            let step = Step { tokens: &[3], position: 20, logits: LogitsRows::Last };
            runner.run(&step).expect("the step runs");
            let mut logits = Vec::new();
            runner.read_logits(&mut logits).expect("the logits come back");
            if !force_no_graphs {
                let times = runner.profile(&step).expect("it can be profiled");
                let total: f64 = times.iter().map(|op| op.seconds).sum();
                println!("{:<58} {:>9.2} us", format!("{} kernels one by one, by events", times.len()), total * 1e6);
                let start = Instant::now();
                for _ in 0..TOKENS {
                    runner.run(&step).expect("the step runs");
                }
                runner.read_logits(&mut logits).expect("the logits come back");
                show("steps kernel by kernel, no choice", start);
            }
            for (name, sampling) in [
                ("greedy", Sampling::greedy()),
                ("top 40", Sampling { top_k: 40, temperature: 1.0, ..Sampling::default() }),
            ] {
                let request = SampleRequest { uniform: 0.5, ..SampleRequest::new(&sampling) };
                let way = if force_no_graphs { "kernel by kernel" } else { "as a graph" };
                runner.run(&step).expect("the step runs");
                if force_no_graphs {
                    let start = Instant::now();
                    for _ in 0..TOKENS {
                        runner.sample(&request).expect("a token");
                    }
                    show(&format!("choices, {name}, each waited for"), start);
                }
                ahead(&mut *runner, &request);
                let start = Instant::now();
                for _ in 0..TOKENS {
                    ahead(&mut *runner, &request);
                    take(&mut *runner);
                }
                show(&format!("tokens {way}, {name}"), start);
                take(&mut *runner);
            }
        }
    }
}

/// Queues a choice and its step.
fn ahead(runner: &mut dyn Runner, request: &SampleRequest<'_>) {
    assert!(runner.begin_ahead(request, 21).expect("it begins"));
    while runner.advance(&Budget::UNLIMITED).expect("it is queued") != Progress::Done {
        runner.wait().expect("the device goes on");
    }
}

/// Waits for the oldest token ahead.
fn take(runner: &mut dyn Runner) {
    while runner.poll_ahead().expect("a token").is_none() {
        runner.wait().expect("the device goes on");
    }
}
