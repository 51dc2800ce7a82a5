//! WGSL compute kernels of Awqua, each with a CPU twin; knows no GPU API.
//!
//! One kernel is one stem: `gemv_w4.wgsl` is the shader body and `gemv_w4.rs` its twin, with the `Params` block, the
//! dispatch `grid`, a naive `reference`, the `cost` and the trials that compare the two. [`compose`] concatenates a
//! body with the preludes of a [`Variant`]; [`catalogue`] holds what naga reflects from the result (bindings,
//! workgroup size and memory, parameter offsets) and is the only list of bindings a backend needs.
//!
//! Rules every kernel follows:
//! - group 0; binding 0 is the uniform `params`, binding 1 the uniform [`Step`] where the kernel has one, storage
//!   buffers from binding 2 on;
//! - entry point [`ENTRY_POINT`]; activations are f32, row-major, with strides and offsets in elements;
//! - workgroup index `x + y * num_workgroups.x` numbers blocks of outputs, `z` numbers token rows;
//! - products are accumulated in f32 in every variant.

use bytemuck::{Pod, Zeroable};

/// Declares a uniform block: a `repr(C)` struct whose size is a multiple of 16 bytes, and the list of its fields.
macro_rules! params {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Default, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl $name {
            /// Name and byte offset of every field, in order.
            pub const FIELDS: &'static [$crate::Field] = &[$($crate::Field {
                name: stringify!($field),
                offset: std::mem::offset_of!($name, $field) as u32,
            }),*];
        }

        const _: () = assert!(std::mem::size_of::<$name>() % 16 == 0, "uniform blocks are whole 16-byte units");
    };
}

pub mod argmax;
pub mod argmax_each;
pub mod argmax_reduce;
pub mod arrange;
pub mod attention;
pub mod attention_coop;
pub mod attention_each;
pub mod attention_few;
pub mod attention_reduce;
pub mod attention_subgroup;
pub mod attention_subgroup_each;
pub mod bias;
pub mod catalogue;
pub mod combine;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod embed;
pub mod embed_packed;
pub mod gate;
pub mod gemm_dense;
pub mod gemm_dense_experts;
pub mod gemm_packed;
pub mod gemm_w4;
pub mod gemm_w4_coop;
pub mod gemm_w4_experts;
pub mod gemv_dense;
pub mod gemv_dense_rows;
pub mod gemv_dense_rows_coop;
pub mod gemv_packed;
pub mod gemv_w4;
pub mod gemv_w4_experts;
pub mod gemv_w4_glu_experts;
pub mod gemv_w4_rope;
pub mod gemv_w4_rows;
pub mod gemv_w4_rows_coop;
pub mod gemv_w4_swiglu;
pub mod glu;
pub mod group;
pub mod halve;
pub mod halve_glu;
pub mod halve_norm;
pub mod head_norm;
pub mod kv;
pub mod mask;
pub mod norm;
pub mod packed;
pub mod penalize;
pub mod rope_append;
pub mod rope_append_each;
pub mod round_groups;
pub mod route;
pub mod sample;
pub mod scale;
pub mod stage;
pub mod staged;
pub mod top_k;
pub mod trial;
pub mod w4;
pub mod w4_stored;

pub use kv::Kv;
pub use trial::{Rng, Trial};

/// Name of the entry point of every kernel.
pub const ENTRY_POINT: &str = "main";

/// Most workgroups of one dispatch dimension.
pub const MAX_GROUPS: u32 = 65_535;

/// Storage buffers that the kernels over the caches of several sessions bind at most; others bind 8.
pub const EACH_BUFFERS: usize = 24;

/// Output `o += ...` instead of `o = ...` (bit of a matmul's `flags`).
pub const FLAG_ACCUMULATE: u32 = 1;
/// The bias buffer is added (bit of a matmul's `flags`).
pub const FLAG_BIAS: u32 = 2;
/// Group offsets are biases (w = q * s + o) instead of zero points (w = (q - o) * s) (bit of a matmul's `flags`).
pub const FLAG_OFFSET_IS_BIAS: u32 = 4;
/// Some group's offset is no zero point between 0 and 15 without fraction, so that sums of inputs are needed besides
/// products with codes (bit of a matmul's `flags`).
pub const FLAG_SUMS: u32 = 8;
/// The input goes through a root mean square norm first (bit of a matmul's `flags`).
pub const FLAG_NORM: u32 = 16;
/// The output is staged as the input of the next matrix, too (bit of `flags`).
pub const FLAG_STAGE: u32 = 32;
/// Staged outputs are weighted for a norm (bit of a matmul's `flags`).
pub const FLAG_STAGE_NORM: u32 = 64;
/// The mean is subtracted first (bit of a norm's `flags`).
pub const FLAG_CENTER: u32 = 128;
/// Every segment has weights of its own (bit of a norm's `flags`).
pub const FLAG_SEGMENTS: u32 = 256;
/// Scales and offsets are single precision, a word each (bit of a matmul's `flags`).
pub const FLAG_WIDE: u32 = 512;
/// Columns are taken in another order (bit of `flags`).
pub const FLAG_ORDER: u32 = 1024;
/// Columns are multiplied with factors (bit of `flags`).
pub const FLAG_FACTORS: u32 = 2048;
/// Weights are rounded to bfloat16 (bit of a matmul's `flags`).
pub const FLAG_BF16: u32 = 4096;
/// Products of codes and scales are rounded, too, before a bias is added (bit of a matmul's `flags`).
pub const FLAG_ROUND_PRODUCTS: u32 = 8192;
/// Outputs are gates and ups, and staged as the activation of one times the other (bit of a matmul's `flags`).
pub const FLAG_GLU: u32 = 16384;
/// Rows are tokens of different sessions, at positions of their own (bit of `flags`).
pub const FLAG_EACH: u32 = 32768;
/// Rows of one split were left whole by the kernel in front (bit of `flags`).
pub const FLAG_WHOLE: u32 = 65536;

/// The flags by the names they have in shaders.
const FLAGS: Constants = &[
    ("FLAG_ACCUMULATE", FLAG_ACCUMULATE),
    ("FLAG_BIAS", FLAG_BIAS),
    ("FLAG_OFFSET_IS_BIAS", FLAG_OFFSET_IS_BIAS),
    ("FLAG_SUMS", FLAG_SUMS),
    ("FLAG_NORM", FLAG_NORM),
    ("FLAG_STAGE", FLAG_STAGE),
    ("FLAG_STAGE_NORM", FLAG_STAGE_NORM),
    ("FLAG_CENTER", FLAG_CENTER),
    ("FLAG_SEGMENTS", FLAG_SEGMENTS),
    ("FLAG_WIDE", FLAG_WIDE),
    ("FLAG_BF16", FLAG_BF16),
    ("FLAG_ROUND_PRODUCTS", FLAG_ROUND_PRODUCTS),
    ("FLAG_ORDER", FLAG_ORDER),
    ("FLAG_FACTORS", FLAG_FACTORS),
    ("FLAG_GLU", FLAG_GLU),
    ("FLAG_EACH", FLAG_EACH),
    ("FLAG_WHOLE", FLAG_WHOLE),
];

params! {
    /// Uniform at binding 1, written once a run.
    Step {
        /// Tokens of the step.
        n_tokens: u32,
        /// Position of the first token.
        position: u32,
        /// First token row that produces logits.
        logits_start: u32,
        /// Number of token rows that produce logits.
        logits_rows: u32,
    }
}

/// Which rows a kernel reads and writes: the `row_mode` of its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum RowMode {
    /// Rows 0..n_tokens in and out.
    All = 0,
    /// Rows logits_start.. in, rows 0.. out, logits_rows of them.
    Logits = 1,
    /// Rows 0..logits_rows in and out.
    Compacted = 2,
}

impl RowMode {
    /// Number of rows of a step; the `rows` argument of the `grid` functions.
    pub fn count(self, step: &Step) -> u32 {
        if self == Self::All { step.n_tokens } else { step.logits_rows }
    }

    /// Input row of output row `row`.
    pub fn input_row(self, step: &Step, row: u32) -> u32 {
        if self == Self::Logits { step.logits_start + row } else { row }
    }

    /// The mode with this number, `All` for an unknown one.
    pub fn from_u32(mode: u32) -> Self {
        match mode {
            1 => Self::Logits,
            2 => Self::Compacted,
            _ => Self::All,
        }
    }
}

/// The function on the gate of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Activation {
    /// v / (1 + exp(-v))
    Silu = 0,
    /// v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v^3)))
    GeluTanh = 1,
    /// v / 2 * (1 + erf(v / sqrt(2)))
    Gelu = 2,
}

impl Activation {
    /// The activation with this number, `Silu` for an unknown one.
    pub fn from_u32(activation: u32) -> Self {
        match activation {
            1 => Self::GeluTanh,
            2 => Self::Gelu,
            _ => Self::Silu,
        }
    }

    /// Its value.
    pub fn of(self, v: f64) -> f64 {
        match self {
            Self::Silu => v / (1.0 + (-v).exp()),
            // 1 + tanh(z) is 2 / (1 + exp(-2 z)).
            Self::GeluTanh => {
                v / (1.0 + (-2.0 * (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).exp())
            }
            Self::Gelu => 0.5 * v * (1.0 + erf(v * std::f64::consts::FRAC_1_SQRT_2)),
        }
    }
}

/// The error function, to about 1e-12.
fn erf(v: f64) -> f64 {
    let x = v.abs();
    if x > 6.0 {
        return v.signum();
    }
    if x > 2.5 {
        // The continued fraction of erfc.
        let fraction = (1..=60).rev().fold(x, |below, k| x + f64::from(k) / 2.0 / below);
        return v.signum() * (1.0 - (-x * x).exp() / (std::f64::consts::PI.sqrt() * fraction));
    }
    // erf(x) = 2 / sqrt(pi) * exp(-x^2) * sum_n 2^n x^(2n + 1) / (2n + 1)!!
    let (mut term, mut sum) = (x, x);
    for n in 1..60 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    v.signum() * std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// Element type that a W4 matmul dequantises and multiplies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Elem {
    /// Single precision; runs everywhere.
    F32,
    /// Half precision; needs the device feature.
    F16,
}

/// How the invocations of a workgroup combine their sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reduce {
    /// A tree in workgroup memory; runs everywhere.
    Workgroup,
    /// Subgroup operations, then workgroup memory; needs the device feature.
    Subgroup,
}

/// Element type of a dense weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dense {
    /// Half precision, two to a word, the first in the low half.
    F16,
    /// bfloat16, two to a word, the first in the low half.
    BF16,
    /// Single precision bits.
    F32,
}

impl Dense {
    /// Elements of one 32-bit word.
    pub const fn per_word(self) -> u32 {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 1,
        }
    }

    /// Value of element `index` of a row of words.
    pub fn element(self, words: &[u32], index: usize) -> f32 {
        let half = |word: u32| (word >> (16 * (index % 2))) as u16;
        match self {
            Self::F16 => half::f16::from_bits(half(words[index / 2])).to_f32(),
            Self::BF16 => half::bf16::from_bits(half(words[index / 2])).to_f32(),
            Self::F32 => f32::from_bits(words[index]),
        }
    }
}

/// Query heads that a workgroup computes at once, over the same keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Heads {
    /// One: every query head has keys and values of its own.
    One,
    /// Up to four.
    Four,
}

impl Heads {
    /// The faster one for this many heads.
    pub fn of(heads: u32, kv_heads: u32) -> Self {
        if heads == kv_heads { Self::One } else { Self::Four }
    }
}

/// Invocations of a workgroup, for kernels that can do with more or fewer slices of the same work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Size {
    /// At most 256, which every device has.
    Small,
    /// 512.
    Medium,
    /// 1024.
    Large,
}

impl Size {
    /// Most invocations of a workgroup of this size.
    pub const fn invocations(self) -> u32 {
        match self {
            Self::Small => 256,
            Self::Medium => 512,
            Self::Large => 1024,
        }
    }
}

/// Numbers that a twin shares with its shader, by name.
pub type Constants = &'static [(&'static str, u32)];

/// How the groups of a packed matrix lie in its quads of chunks, 128 inputs each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Groups {
    /// A quad has one group: sizes of 128, 256, ... or a whole row.
    Quads,
    /// A chunk has one group: sizes of 32, 64, ... or a whole row.
    Chunks,
    /// Any size; slow.
    Any,
}

impl Groups {
    /// The fastest that fits groups of `group_size` inputs of `k`.
    pub fn of(group_size: u32, k: u32) -> Self {
        match gemv_w4::group_shift(group_size, k) {
            7.. => Self::Quads,
            5.. => Self::Chunks,
            _ => Self::Any,
        }
    }
}

/// What the words of a packed matrix are; [`Packed::Affine2`] and so on by the bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the widths of a code speak for themselves")]
pub enum Packed {
    /// The tiled 4-bit layout of [`w4`].
    W4,
    Affine2,
    Affine3,
    Affine4,
    Affine5,
    Affine6,
    Affine8,
    /// 4-bit indices into a table of 16 numbers.
    Codebook,
    /// GGML blocks `Q4_K`.
    Q4K,
    /// GGML blocks `Q5_K`.
    Q5K,
    /// GGML blocks `Q6_K`.
    Q6K,
}

/// A choice on every axis; a kernel ignores the axes it does not have ([`Kernel::canonical`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Variant {
    /// Element type of W4 matmuls.
    pub elem: Elem,
    /// Reduction of a workgroup.
    pub reduce: Reduce,
    /// Element type of dense weights.
    pub dense: Dense,
    /// Element type of the KV cache.
    pub kv: Kv,
    /// Size of the workgroup.
    pub size: Size,
    /// Group sizes of the packed matrix.
    pub groups: Groups,
    /// Kind of the packed matrix, for kernels of any kind.
    pub packed: Packed,
    /// Query heads of a workgroup.
    pub heads: Heads,
}

impl Default for Variant {
    /// What runs on every device, with half precision storage.
    fn default() -> Self {
        Self {
            elem: Elem::F32,
            reduce: Reduce::Workgroup,
            dense: Dense::F16,
            kv: Kv::F16,
            size: Size::Small,
            groups: Groups::Any,
            packed: Packed::W4,
            heads: Heads::Four,
        }
    }
}

/// Name and byte offset of a field of a uniform block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Field name, the same in WGSL and Rust.
    pub name: &'static str,
    /// Bytes from the start of the block.
    pub offset: u32,
}

/// A piece of WGSL in front of a body. The axis preludes are one of several files that define the same names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prelude {
    /// The `step` uniform and the row mapping.
    Step,
    /// Axis [`Elem`]: `Elem` and the dot product of packed codes.
    Elem,
    /// Axis [`Reduce`]: sums over a workgroup of `WG` invocations.
    Reduce,
    /// Axis [`Dense`]: decoding of dense words.
    Dense,
    /// Axis [`Kv`]: packing of cache words.
    Kv,
    /// Axis [`Kv`], with [`Self::Kv`]: eight elements of the cache at a time.
    KvEight,
    /// Axes [`Kv`] and [`Heads`], with [`Self::Kv`]: what a lane of a subgroup reads of the cache.
    KvLane,
    /// Axis [`Kv`] without single precision, with [`Self::Kv`]: what goes to matrix units.
    KvCoop,
    /// Group parameters of the canonical 4-bit layout.
    W4,
    /// Axis [`Packed`]: `weights8`, given the bindings codes and group_params.
    Packed,
    /// What `weights8` returns.
    Weights8,
    /// The tiled matrix product, given `weights8`, `x_row` and `out_row`.
    Gemm,
    /// `weights8` of the 4-bit layout.
    Weights8W4,
    /// `weights8` of a dense matrix.
    Weights8Dense,
    /// Rows of a tiled product: those of the step.
    GemmRows,
    /// Rows of a tiled product: pairs of tokens and experts.
    GemmPairs,
    /// Products of a chunk of a packed matrix with staged inputs.
    GemvW4Chunk,
    /// What products of a packed matrix with one row of staged inputs are made of, with [`Self::GemvW4Chunk`].
    GemvW4,
    /// Such a product, one output an invocation.
    GemvW4One,
    /// Such a product, two outputs an invocation.
    GemvW4Pair,
    /// The layout of staged inputs.
    Stage,
    /// Writing staged inputs to the binding `staged`, eight an invocation.
    StageEight,
    /// The same, a chunk a workgroup, with [`Self::StageEight`].
    StageOut,
    /// Rows in half precision for matrix units, given `inputs4`.
    Halve,
    /// Products of dense words with their inputs.
    GemvDense,
    /// Axis [`Kv`], with [`Self::Kv`]: rotation and the way to the cache.
    RopeAppend,
    /// Axis [`Kv`], with [`Self::Kv`]: the way of rotated outputs of a product to the cache.
    Append,
    /// Attention over one split of the positions, eight elements at a time.
    AttentionEights,
    /// Half precision matrix units of 16x16x16 with sums in f32, in subgroups of 32.
    Coop,
    /// Products of the rows of a pass on matrix units, with [`Self::Coop`].
    CoopRows,
    /// 4-bit weights in half precision, given `w_tile`.
    CoopWeights,
    /// Total order of scores with their ids.
    Order,
    /// The first candidate of a workgroup, with [`Self::Order`].
    Best,
    /// The function on the gate of a gated MLP.
    Activation,
    /// Bounded scores.
    Softcap,
    /// Positions that a token sees, by the field `window`.
    Window,
    /// The rows of the members of a pass and their caches.
    Members,
    /// Attention by lanes of subgroups over the parts of a cache, given `place_of`, `key_words` and `value_words`.
    AttentionLanes,
    /// A workgroup's share of heads and positions in attention.
    Split,
    /// Axis [`Heads`]: what there is of each query head of a workgroup.
    Heads,
}

/// A kernel: its body, the preludes it needs and the numbers shared with its twin.
#[derive(Debug)]
pub struct Kernel {
    /// Stem of its files.
    pub name: &'static str,
    /// WGSL without preludes.
    pub body: &'static str,
    /// Preludes in order.
    pub preludes: &'static [Prelude],
    /// Numbers that the twin owns, emitted as `const NAME: u32 = value;`. `WG` is the workgroup size.
    pub constants: Constants,
    /// The constants that differ in the larger sizes, from [`Size::Medium`] on; empty if the kernel has one size.
    pub sizes: &'static [Constants],
    /// Fields of the uniform at binding 0.
    pub params: &'static [Field],
    /// Random runs of every case with the outcome the twin expects.
    pub trials: fn(Variant, &mut Rng) -> Vec<Trial>,
}

impl Kernel {
    /// What naga reflected from the kernel.
    pub fn catalogue(&self) -> &'static catalogue::Entry {
        catalogue::ENTRIES.iter().find(|entry| entry.name == self.name).expect("a test compares the catalogue with ALL")
    }

    /// Whether the device must have the matrix units of [`Prelude::Coop`].
    pub fn needs_coop(&self) -> bool {
        self.preludes.contains(&Prelude::Coop)
    }

    /// The largest size that it has.
    pub fn largest(&self) -> Size {
        [Size::Small, Size::Medium, Size::Large][self.sizes.len().min(2)]
    }

    /// The variant with every axis this kernel does not have at its default, so that equal shaders compare equal.
    pub fn canonical(&self, variant: Variant) -> Variant {
        let has = |prelude| self.preludes.contains(&prelude);
        let base = Variant::default();
        Variant {
            elem: match (has(Prelude::Elem), self.needs_coop()) {
                (true, true) => Elem::F16,
                (true, false) => variant.elem,
                (false, _) => base.elem,
            },
            reduce: if has(Prelude::Reduce) { variant.reduce } else { base.reduce },
            dense: if has(Prelude::Dense) { variant.dense } else { base.dense },
            kv: match variant.kv {
                Kv::F32 if has(Prelude::KvCoop) => base.kv,
                kv if has(Prelude::Kv) => kv,
                _ => base.kv,
            },
            size: variant.size.min(self.largest()),
            groups: if has(Prelude::GemvW4Chunk) { variant.groups } else { base.groups },
            packed: if has(Prelude::Packed) { variant.packed } else { base.packed },
            heads: if has(Prelude::Heads) { variant.heads } else { base.heads },
        }
    }

    /// Every distinct variant of this kernel.
    pub fn variants(&self) -> Vec<Variant> {
        let all = vec![Variant::default()];
        let all = each(&all, &[Elem::F32, Elem::F16], |elem, v| Variant { elem, ..v });
        let all = each(&all, &[Reduce::Workgroup, Reduce::Subgroup], |reduce, v| Variant { reduce, ..v });
        let all = each(&all, &[Dense::F16, Dense::BF16, Dense::F32], |dense, v| Variant { dense, ..v });
        let all = each(&all, &[Kv::F16, Kv::F32, Kv::Q8], |kv, v| Variant { kv, ..v });
        let all = each(&all, &[Size::Small, Size::Medium, Size::Large], |size, v| Variant { size, ..v });
        let all = each(&all, &[Groups::Quads, Groups::Chunks, Groups::Any], |groups, v| Variant { groups, ..v });
        let all = each(&all, &Packed::ALL, |packed, v| Variant { packed, ..v });
        let all = each(&all, &[Heads::One, Heads::Four], |heads, v| Variant { heads, ..v });
        let mut all: Vec<Variant> = all.into_iter().map(|variant| self.canonical(variant)).collect();
        all.sort();
        all.dedup();
        all
    }

    /// Name with the axes the kernel has, such as `gemv_w4-f16-subgroup`.
    pub fn label(&self, variant: Variant) -> String {
        let mut label = self.name.to_owned();
        for prelude in self.preludes {
            label += match (prelude, variant) {
                (Prelude::Elem, Variant { elem: Elem::F32, .. }) => "-f32",
                (Prelude::Elem, Variant { elem: Elem::F16, .. }) => "-f16",
                (Prelude::Reduce, Variant { reduce: Reduce::Workgroup, .. }) => "-workgroup",
                (Prelude::Reduce, Variant { reduce: Reduce::Subgroup, .. }) => "-subgroup",
                (Prelude::Dense, Variant { dense: Dense::F16, .. }) => "-wf16",
                (Prelude::Dense, Variant { dense: Dense::BF16, .. }) => "-wbf16",
                (Prelude::Dense, Variant { dense: Dense::F32, .. }) => "-wf32",
                (Prelude::Kv, Variant { kv: Kv::F16, .. }) => "-kvf16",
                (Prelude::Kv, Variant { kv: Kv::F32, .. }) => "-kvf32",
                (Prelude::Kv, Variant { kv: Kv::Q8, .. }) => "-kvq8",
                (Prelude::Heads, Variant { heads: Heads::One, .. }) => "-one",
                (Prelude::GemvW4Chunk, Variant { groups: Groups::Quads, .. }) => "-quads",
                (Prelude::GemvW4Chunk, Variant { groups: Groups::Chunks, .. }) => "-chunks",
                _ => "",
            };
            if *prelude == Prelude::Packed {
                label = format!("{label}-{}", variant.packed.name());
            }
        }
        if !self.sizes.is_empty() {
            label += &format!("-{}", variant.size.invocations());
        }
        label
    }
}

/// All variants with each of the choices.
fn each<T: Copy>(all: &[Variant], choices: &[T], with: impl Fn(T, Variant) -> Variant) -> Vec<Variant> {
    all.iter().flat_map(|&variant| choices.iter().map(|&choice| with(choice, variant)).collect::<Vec<_>>()).collect()
}

/// Every kernel.
pub static ALL: [&Kernel; 51] = [
    &embed::KERNEL,
    &embed_packed::KERNEL,
    &arrange::KERNEL,
    &stage::KERNEL,
    &norm::KERNEL,
    &head_norm::KERNEL,
    &gemv_w4::KERNEL,
    &gemv_w4_rope::KERNEL,
    &gemv_w4_swiglu::KERNEL,
    &gemv_w4_rows::KERNEL,
    &gemv_w4_rows_coop::KERNEL,
    &gemm_w4::KERNEL,
    &halve::KERNEL,
    &halve_glu::KERNEL,
    &halve_norm::KERNEL,
    &gemm_w4_coop::KERNEL,
    &gemv_dense::KERNEL,
    &gemv_dense_rows::KERNEL,
    &gemv_dense_rows_coop::KERNEL,
    &gemm_dense::KERNEL,
    &gemv_packed::KERNEL,
    &gemm_packed::KERNEL,
    &rope_append::KERNEL,
    &rope_append_each::KERNEL,
    &round_groups::KERNEL,
    &attention::KERNEL,
    &attention_few::KERNEL,
    &attention_each::KERNEL,
    &attention_subgroup::KERNEL,
    &attention_subgroup_each::KERNEL,
    &attention_coop::KERNEL,
    &attention_reduce::KERNEL,
    &glu::KERNEL,
    &scale::KERNEL,
    &route::KERNEL,
    &group::KERNEL,
    &gemv_w4_experts::KERNEL,
    &gemv_w4_glu_experts::KERNEL,
    &gemm_w4_experts::KERNEL,
    &gemm_dense_experts::KERNEL,
    &combine::KERNEL,
    &gate::KERNEL,
    &bias::KERNEL,
    &penalize::KERNEL,
    &mask::KERNEL,
    &argmax::KERNEL,
    &argmax_each::KERNEL,
    &argmax_reduce::KERNEL,
    &top_k::KERNEL,
    &sample::KERNEL,
    &w4_stored::KERNEL,
];

/// The complete WGSL of a kernel: constants, preludes of the variant, body.
pub fn compose(kernel: &Kernel, variant: Variant) -> String {
    let variant = kernel.canonical(variant);
    let mut source = String::new();
    if variant.elem == Elem::F16 || kernel.needs_coop() {
        source += "enable f16;\n";
    }
    if kernel.needs_coop() {
        source += "enable wgpu_cooperative_matrix;\n";
    }
    let sized = (variant.size as usize).checked_sub(1).and_then(|i| kernel.sizes.get(i)).copied().unwrap_or(&[]);
    for &(name, value) in kernel.constants {
        let value = sized.iter().find(|(other, _)| *other == name).map_or(value, |&(_, value)| value);
        source += &format!("const {name}: u32 = {value}u;\n");
    }
    for &(name, value) in FLAGS {
        source += &format!("const {name}: u32 = {value}u;\n");
    }
    if kernel.preludes.contains(&Prelude::GemvW4Chunk) {
        source += &format!("const GROUPS: u32 = {}u;\n", variant.groups as u32);
    }
    if kernel.preludes.contains(&Prelude::Packed) {
        source += &format!("const BITS: u32 = {}u;\n", variant.packed.bits());
    }
    if variant.kv == Kv::Q8 {
        source += &format!("const KV_GROUP: u32 = {}u;\n", kv::GROUP);
        source += &format!("const LARGEST_SCALE: f32 = {:?};\n", kv::LARGEST_SCALE);
    }
    for prelude in kernel.preludes {
        source += match (prelude, variant) {
            (Prelude::Step, _) => include_str!("prelude/step.wgsl"),
            (Prelude::Elem, Variant { elem: Elem::F32, .. }) => include_str!("prelude/elem_f32.wgsl"),
            (Prelude::Elem, Variant { elem: Elem::F16, .. }) => include_str!("prelude/elem_f16.wgsl"),
            (Prelude::Reduce, Variant { reduce: Reduce::Workgroup, .. }) => {
                include_str!("prelude/reduce_workgroup.wgsl")
            }
            (Prelude::Reduce, Variant { reduce: Reduce::Subgroup, .. }) => include_str!("prelude/reduce_subgroup.wgsl"),
            (Prelude::Dense, Variant { dense: Dense::F16, .. }) => include_str!("prelude/dense_f16.wgsl"),
            (Prelude::Dense, Variant { dense: Dense::BF16, .. }) => include_str!("prelude/dense_bf16.wgsl"),
            (Prelude::Dense, Variant { dense: Dense::F32, .. }) => include_str!("prelude/dense_f32.wgsl"),
            (Prelude::Kv, Variant { kv: Kv::F16, .. }) => include_str!("prelude/kv_f16.wgsl"),
            (Prelude::Kv, Variant { kv: Kv::F32, .. }) => include_str!("prelude/kv_f32.wgsl"),
            (Prelude::Kv, Variant { kv: Kv::Q8, .. }) => include_str!("prelude/kv_q8.wgsl"),
            (Prelude::KvEight, Variant { kv: Kv::F16, .. }) => {
                concat!(include_str!("prelude/eight.wgsl"), include_str!("prelude/kv_eight_f16.wgsl"))
            }
            (Prelude::KvEight, Variant { kv: Kv::F32, .. }) => {
                concat!(include_str!("prelude/eight.wgsl"), include_str!("prelude/kv_eight_f32.wgsl"))
            }
            (Prelude::KvEight, Variant { kv: Kv::Q8, .. }) => {
                concat!(include_str!("prelude/eight.wgsl"), include_str!("prelude/kv_eight_q8.wgsl"))
            }
            (Prelude::KvLane, Variant { kv: Kv::F16, .. }) => concat!(
                include_str!("prelude/eight.wgsl"),
                include_str!("prelude/lane_eight.wgsl"),
                include_str!("prelude/lane_f16.wgsl"),
                include_str!("prelude/sweep_wide.wgsl")
            ),
            (Prelude::KvLane, Variant { kv: Kv::F32, .. }) => concat!(
                include_str!("prelude/eight.wgsl"),
                include_str!("prelude/lane_eight.wgsl"),
                include_str!("prelude/lane_f32.wgsl"),
                include_str!("prelude/sweep_wide.wgsl")
            ),
            // Sixteen elements of four query heads do not fit the registers.
            (Prelude::KvLane, Variant { kv: Kv::Q8, heads: Heads::Four, .. }) => concat!(
                include_str!("prelude/eight.wgsl"),
                include_str!("prelude/lane_eight.wgsl"),
                include_str!("prelude/lane_q8_eight.wgsl"),
                include_str!("prelude/sweep_q8.wgsl")
            ),
            (Prelude::KvLane, Variant { kv: Kv::Q8, heads: Heads::One, .. }) => concat!(
                include_str!("prelude/lane_sixteen.wgsl"),
                include_str!("prelude/lane_q8_sixteen.wgsl"),
                include_str!("prelude/sweep_q8.wgsl")
            ),
            (Prelude::KvCoop, Variant { kv: Kv::Q8, .. }) => include_str!("prelude/coop_q8.wgsl"),
            (Prelude::KvCoop, _) => include_str!("prelude/coop_f16.wgsl"),
            (Prelude::W4, _) => include_str!("prelude/w4.wgsl"),
            (Prelude::GemvW4Chunk, _) => include_str!("prelude/gemv_w4_chunk.wgsl"),
            (Prelude::GemvW4, _) => include_str!("prelude/gemv_w4.wgsl"),
            (Prelude::GemvW4One, _) => include_str!("prelude/gemv_w4_one.wgsl"),
            (Prelude::GemvW4Pair, _) => include_str!("prelude/gemv_w4_pair.wgsl"),
            (Prelude::Halve, _) => include_str!("prelude/halve.wgsl"),
            (Prelude::Coop, _) => "",
            (Prelude::CoopRows, _) => include_str!("prelude/coop_rows.wgsl"),
            (Prelude::CoopWeights, _) => include_str!("prelude/coop_weights.wgsl"),
            (Prelude::Stage, _) => include_str!("prelude/stage.wgsl"),
            (Prelude::StageEight, _) => include_str!("prelude/stage_eight.wgsl"),
            (Prelude::StageOut, _) => include_str!("prelude/stage_out.wgsl"),
            (Prelude::GemvDense, _) => include_str!("prelude/gemv_dense.wgsl"),
            (Prelude::RopeAppend, Variant { kv: Kv::Q8, .. }) => {
                concat!(include_str!("prelude/rope_append.wgsl"), include_str!("prelude/rope_append_groups.wgsl"))
            }
            (Prelude::RopeAppend, _) => {
                concat!(include_str!("prelude/rope_append.wgsl"), include_str!("prelude/rope_append_pairs.wgsl"))
            }
            (Prelude::Append, Variant { kv: Kv::Q8, .. }) => include_str!("prelude/append_groups.wgsl"),
            (Prelude::Append, _) => include_str!("prelude/append_pairs.wgsl"),
            (Prelude::Best, _) => include_str!("prelude/best.wgsl"),
            (Prelude::Members, _) => include_str!("prelude/members.wgsl"),
            (Prelude::AttentionLanes, _) => {
                concat!(include_str!("prelude/place.wgsl"), include_str!("prelude/attention_lanes.wgsl"))
            }
            (Prelude::AttentionEights, _) => {
                concat!(include_str!("prelude/place.wgsl"), include_str!("prelude/attention_eights.wgsl"))
            }
            (Prelude::Gemm, _) => include_str!("prelude/gemm.wgsl"),
            (Prelude::Weights8, _) => include_str!("prelude/weights8.wgsl"),
            (Prelude::Packed, Variant { packed: Packed::W4, .. }) => {
                concat!(include_str!("prelude/w4.wgsl"), include_str!("prelude/packed_w4.wgsl"))
            }
            (Prelude::Packed, Variant { packed: Packed::Codebook, .. }) => {
                include_str!("prelude/packed_codebook.wgsl")
            }
            (Prelude::Packed, Variant { packed: Packed::Q4K, .. }) => {
                concat!(include_str!("prelude/packed_k_scales.wgsl"), include_str!("prelude/packed_q4_k.wgsl"))
            }
            (Prelude::Packed, Variant { packed: Packed::Q5K, .. }) => {
                concat!(include_str!("prelude/packed_k_scales.wgsl"), include_str!("prelude/packed_q5_k.wgsl"))
            }
            (Prelude::Packed, Variant { packed: Packed::Q6K, .. }) => include_str!("prelude/packed_q6_k.wgsl"),
            (Prelude::Packed, _) => include_str!("prelude/packed_affine.wgsl"),
            (Prelude::Weights8W4, _) => include_str!("prelude/weights8_w4.wgsl"),
            (Prelude::Weights8Dense, _) => include_str!("prelude/weights8_dense.wgsl"),
            (Prelude::GemmRows, _) => include_str!("prelude/gemm_rows.wgsl"),
            (Prelude::GemmPairs, _) => include_str!("prelude/gemm_pairs.wgsl"),
            (Prelude::Order, _) => include_str!("prelude/order.wgsl"),
            (Prelude::Activation, _) => include_str!("prelude/activation.wgsl"),
            (Prelude::Softcap, _) => include_str!("prelude/softcap.wgsl"),
            (Prelude::Window, _) => include_str!("prelude/window.wgsl"),
            (Prelude::Split, _) => include_str!("prelude/split.wgsl"),
            (Prelude::Heads, Variant { heads: Heads::One, .. }) => include_str!("prelude/heads_one.wgsl"),
            (Prelude::Heads, Variant { heads: Heads::Four, .. }) => include_str!("prelude/heads_four.wgsl"),
        };
    }
    source + kernel.body
}

/// What one dispatch moves and computes at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of device memory, each distinct one counted once.
    pub bytes: u64,
    /// Multiplications and additions.
    pub flops: u64,
}

/// Dispatch of `blocks` workgroups for each of `rows` rows: blocks over x and y, rows over z. The last y line may be
/// ragged; kernels check their block number.
pub fn grid(blocks: u32, rows: u32) -> [u32; 3] {
    let lines = blocks.div_ceil(MAX_GROUPS).max(1);
    [blocks.div_ceil(lines), lines, rows]
}

/// The bytes of a uniform block.
pub fn uniform_bytes<T: Pod + Zeroable>(block: &T) -> &[u8] {
    bytemuck::bytes_of(block)
}

#[cfg(test)]
mod tests;
