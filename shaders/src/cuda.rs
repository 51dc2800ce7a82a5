//! The CUDA kernels: compiled images, the arguments they take, and numbers that host code shares with them.
//!
//! Every kernel takes one structure by value. Addresses are those of device memory (`u64`), 0 for none; what a field
//! means stands beside it in the `.cu` file of the kernel. A test compares sizes, fields and numbers with the sources.

use std::io::Read;

/// Declares the arguments of a kernel: a `repr(C)` structure without padding.
macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {
        $($(#[$doc])*
        #[allow(missing_docs, reason = "the fields are documented in the kernels' sources")]
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Default, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name { $(pub $field: $type,)* })*

        /// Name, bytes and fields with their byte offsets of every structure.
        pub const ARGUMENTS: &[(&str, usize, &[crate::Field])] = &[$((
            stringify!($name),
            std::mem::size_of::<$name>(),
            &[$(crate::Field {
                name: stringify!($field),
                offset: std::mem::offset_of!($name, $field) as u32,
            }),*],
        )),*];
    };
}

arguments! {
    /// A packed matrix and the fate of its products (`prelude/w4.cuh`).
    Product {
        codes: u64, params: u64, bias: u64, out: u64, half_out: u64, rows: u64,
        n: u32, stages: u32, groups: u32, group_shift: u32, flags: u32, target: u32, pairs: u32,
        out_stride: u32, out_offset: u32, out_tiled: u32,
        heads: u32, kv_heads: u32, head_dim: u32, rotary_dim: u32, layer: u32, activation: u32,
        scale: f32, table: u32,
    }
    /// Arguments of `gemv_w4_*`.
    GemvW4Args {
        product: Product,
        x: u64, half_x: u64, norm: u64,
        eps: f32, k: u32, x_stride: u32, tokens: u32,
    }
    /// Arguments of `gemm_*`.
    GemmArgs {
        product: Product,
        x: u64, dense: u64,
        tokens: u32, pad: u32,
    }
    /// The experts of the step's tokens (`prelude/rows.cuh`).
    Experts {
        routes: u64, tiles: u64, slots: u64,
        row_tiles: u32, top_k: u32, share: u32, routes_stride: u32,
    }
    /// Arguments of `gemv_w4_*_experts_*`.
    GemvW4ExpertsArgs { gemv: GemvW4Args, experts: Experts, }
    /// Arguments of `gemm_*_experts*`.
    GemmExpertsArgs { gemm: GemmArgs, experts: Experts, }
    /// Arguments of `route`.
    RouteArgs {
        logits: u64, routes: u64,
        tokens: u32, logits_stride: u32, routes_stride: u32, experts: u32, top_k: u32, renormalise: u32,
    }
    /// Arguments of `group`.
    GroupArgs {
        routes: u64, tiles: u64, slots: u64,
        tokens: u32, top_k: u32, experts: u32, tile: u32, all_tiles: u32, routes_stride: u32,
    }
    /// Arguments of `combine`.
    CombineArgs {
        x: u64, routes: u64, out: u64,
        width: u32, top_k: u32, x_stride: u32, routes_stride: u32, out_stride: u32, pad: u32,
    }
    /// Arguments of `gate`.
    GateArgs {
        x: u64, gate: u64,
        width: u32, x_stride: u32, gate_stride: u32, pad: u32,
    }
    /// Arguments of `stage`.
    StageArgs {
        x: u64, norm: u64, out: u64, slots: u64,
        eps: f32, k: u32, x_stride: u32, first_row: u32, out_stride: u32, out_tiled: u32, share: u32, pad: u32,
    }
    /// Arguments of `embed`.
    EmbedArgs {
        table: u64, tokens: u64, places: u64, rows: u64, out: u64,
        width: u32, table_stride: u32, out_stride: u32, separate: u32,
        scale: f32, pad: u32,
    }
    /// Arguments of `norm_rows`.
    NormArgs {
        x: u64, weight: u64, bias: u64, out: u64,
        dim: u32, x_stride: u32, out_stride: u32, x_offset: u32, out_offset: u32, first_row: u32, weight_step: u32,
        flags: u32,
        eps: f32, pad: u32,
    }
    /// Arguments of `glu`.
    GluArgs {
        x: u64, out: u64,
        width: u32, x_stride: u32, out_stride: u32, activation: u32,
    }
    /// Arguments of `scale`.
    ScaleArgs {
        x: u64,
        width: u32, x_stride: u32,
        scale: f32, cap: f32,
    }
    /// Arguments of `rope_append`.
    RopeAppendArgs {
        qkv: u64, q: u64, q_norm: u64, k_norm: u64, rows: u64,
        qkv_stride: u32, q_stride: u32, heads: u32, kv_heads: u32, head_dim: u32, rotary_dim: u32, layer: u32, kv: u32,
        eps: f32, table: u32, layers: u32, pad: u32,
    }
    /// Arguments of `gemv_dense_*`.
    GemvDenseArgs {
        w: u64, bias: u64, x: u64, half_x: u64, norm: u64, out: u64,
        eps: f32, n: u32, k: u32, stride: u32, x_stride: u32, out_stride: u32, out_offset: u32, tokens: u32, flags: u32,
        scale: f32,
    }
    /// Arguments of `gemv_dense_1_experts`.
    GemvDenseExpertsArgs { gemv: GemvDenseArgs, experts: Experts, }
    /// Arguments of `attention_*` for few tokens.
    AttentionArgs {
        q: u64, rows: u64, out: u64, partial: u64, weights: u64, arrived: u64,
        q_stride: u32, out_stride: u32, out_tiled: u32, heads: u32, kv_heads: u32, layer: u32, window: u32,
        scale: f32, cap: f32, layers: u32,
    }
    /// Arguments of `attention_any`.
    AttentionAnyArgs {
        qkv: u64, rows: u64, out: u64,
        qkv_stride: u32, out_stride: u32, heads: u32, kv_heads: u32, head_dim: u32, layer: u32, window: u32, kv: u32,
        scale: f32, cap: f32, layers: u32, pad: u32,
    }
    /// Arguments of `attention_coop_*`.
    AttentionCoopArgs {
        q: u64, rows: u64, out: u64,
        tokens: u32, q_stride: u32, out_stride: u32, out_tiled: u32, heads: u32, kv_heads: u32, layer: u32, window: u32,
        scale: f32, cap: f32, layers: u32, pad: u32,
    }
    /// A choice, in memory of the host.
    SampleRequest {
        top_k: u32, n_recent: u32,
        temperature: f32, top_p: f32, min_p: f32, uniform: f32, repetition: f32, presence: f32, frequency: f32,
        position: u32, n_biases: u32, has_mask: u32, mask_words: u32, pad: [u32; 3],
    }
    /// Arguments of `sample_*`.
    SampleArgs {
        scores: u64, requests: u64, recent: u64, biases: u64, mask: u64, candidates: u64, turn: u64, tokens: u64, position: u64, results: u64,
        vocab: u32, second: u32,
    }
    /// Arguments of `sample_*_each`.
    SampleEachArgs { members: u64, }
    /// Arguments of `hand_out`.
    HandOutArgs {
        from: u64, to: u64,
        width: u32, stride: u32,
    }
    /// Arguments of `w4_*`.
    W4Args {
        codes: u64, params: u64, scales: u64, zeros: u64, out: u64, out_params: u64,
        n: u32, k: u32, groups: u32, stages: u32, first_tile: u32, tiles: u32, first_chunk: u32, first_group: u32,
    }
    /// Arguments of `dense_rows`.
    RowsArgs {
        from: u64, to: u64,
        k: u32, stride: u32, r#type: u32, pad: u32,
    }
    /// A token's place in a KV cache.
    Row { cache: u64, prefix: u64, rope: u64, context: u32, position: u32, shared: u32, own: u32, }
    /// Where a step goes.
    Place { cache: u64, prefix: u64, rope: u64, context: u32, position: u32, shared: u32, own: u32, }
}

/// Declares numbers that the sources declare as well, and lists them for a test.
macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: u32 = $value;)*

        /// Every number by its name in the sources.
        pub const NUMBERS: &[(&str, u32)] = &[$((stringify!($name), $name)),*];
    };
}

numbers! {
    /// [`Product::flags`]: add to what is there.
    ADD = 1;
    /// [`Product::flags`]: add the bias.
    HAS_BIAS = 2;
    /// [`Product::flags`]: group offsets are biases.
    OFFSET_IS_BIAS = 4;
    /// [`Product::flags`]: some zero points are no integers.
    FRACTIONS = 8;
    /// [`NormArgs::flags`]: subtract the mean; [`ADD`] is another.
    CENTER = 16;
    /// [`GluArgs::activation`], [`Product::activation`]: v / (1 + exp(-v)).
    SILU = 0;
    /// The same: GELU by its tanh formula.
    GELU_TANH = 1;
    /// The same: GELU by the error function.
    GELU = 2;
    /// Inputs of a stage; rows of inputs and dense weights are padded to it.
    STAGE = 128;
    /// Inputs of a chunk.
    CHUNK = 64;
    /// Rows of a tile.
    TILE = 16;
    /// [`Product::target`]: f32 rows.
    TO_ROWS = 0;
    /// [`Product::target`]: the product of the activation of the first half and the second one, as inputs.
    TO_GLU = 1;
    /// [`Product::target`]: rotated queries, keys and values.
    TO_ROPE = 2;
    /// Warps of a block of `route`, each of which has a token.
    ROUTE_WARPS = 8;
    /// Tokens of a block of `gemm_w4_*` and `gemm_dense_*`.
    GEMM_TOKENS = 64;
    /// Warps of one.
    GEMM_WARPS = 8;
    /// Chunks of inputs in flight in one.
    GEMM_DEPTH = 3;
    /// Stages of the ring of a warp of `gemv_w4_*`.
    GEMV_DEPTH = 3;
    /// The same in `gemm_w4_coop_*`.
    COOP_DEPTH = 6;
    /// Pairs of tiles of a block of `gemm_w4_coop_*`.
    COOP_PAIRS = 8;
    /// Threads of one.
    COOP_THREADS = 384;
    /// Warps of a block of `attention_*`.
    ATTENTION_WARPS = 4;
    /// Positions that such a block takes at once.
    BLOCK_POSITIONS = 64;
    /// Most heads of queries of such a block.
    MANY_HEADS = 16;
    /// Tokens of a block of `attention_coop_*`.
    COOP_TOKENS = 128;
    /// Positions that such a block takes at once.
    SPAN = 64;
    /// [`RopeAppendArgs::kv`]: half precision.
    KV_F16 = 0;
    /// [`RopeAppendArgs::kv`]: single precision.
    KV_F32 = 1;
    /// The same: signed bytes with scales.
    KV_Q8 = 2;
    /// Elements of a head that share a scale in [`KV_Q8`].
    KV_GROUP = 32;
    /// [`RowsArgs::type`]: half precision.
    FROM_F16 = 0;
    /// [`RowsArgs::type`]: bfloat16.
    FROM_BF16 = 1;
    /// [`RowsArgs::type`]: single precision.
    FROM_F32 = 2;
    /// Choices whose requests and results have room.
    SLOTS = 16;
    /// Scores that a block of the sampler sorts.
    SLICE = 2048;
    /// Candidates that its last block sorts.
    MOST_LEFT = 4096;
}

/// Inputs that come neither from a norm nor from attention are stored divided by this.
pub const WIDE: f32 = 32.0;

/// Offset of the element of token `token` and input `k` in inputs in tiles of `chunks` chunks a row: twin of
/// `tile_offset` in `prelude/w4.cuh`.
pub const fn tile_offset(token: usize, k: usize, chunks: usize) -> usize {
    let (i, j, c) = (k % 4, k / 32 % 2 * 2 + k / 4 % 2, k / 8 % 4);
    let at = 16 * j + 2 * c + (i & 1) + 8 * (i >> 1);
    let unit = (at / 8) ^ (token % 8);
    ((token / 64 * chunks + k / CHUNK as usize) * 64 + token % 64) * 64 + unit * 8 + at % 8
}

/// Bytes of shared memory of `gemv_w4`, for matrices of `stages` stages with `per_stage` groups in one.
pub const fn gemv_shared(tokens: u32, per_stage: u32, warps: u32, stages: u32) -> u32 {
    let inputs = if tokens == 1 { 0 } else { tokens * 2 * STAGE };
    let rings = warps * GEMV_DEPTH * (2048 + 128 * per_stage + inputs);
    if tokens == 1 {
        return rings + stages * (STAGE * 2 + 4) + warps * (2 * TILE + 1) * 4;
    }
    // The warps' sums take the place of the rings.
    let sums = warps * 2 * tokens * 20 * 4;
    if sums > rings { sums } else { rings }
}

/// Bytes of shared memory of `gemm_w4_*` and `gemm_dense_*` with blocks of `pairs` pairs of tiles.
pub const fn gemm_shared(pairs: u32) -> u32 {
    let rings = GEMM_WARPS / pairs * GEMM_DEPTH * GEMM_TOKENS * CHUNK * 2;
    let sums = GEMM_WARPS * GEMM_TOKENS * 2 * TILE * 4;
    if sums > rings { sums } else { rings }
}

/// Bytes of shared memory of `gemm_w4_coop_*` for blocks of `tokens` tokens.
pub const fn gemm_coop_shared(tokens: u32) -> u32 {
    let (ring, sums) = (COOP_DEPTH * tokens * CHUNK * 2, COOP_PAIRS * tokens * 128);
    (if sums > ring { sums } else { ring }) + COOP_DEPTH * 16
}

/// Bytes of shared memory of `gemv_dense_*`, `tokens` of them, with rows of `stride` elements.
pub const fn gemv_dense_shared(tokens: u32, stride: u32) -> u32 {
    (if tokens == 1 { 2 } else { tokens }) * stride * 2 + 33 * 4
}

/// Bytes of the scales of a row of a cache of [`KV_Q8`]; there are rows for a multiple of four positions.
pub const fn scale_bytes(head_dim: u32) -> u32 {
    4 * head_dim.div_ceil(2 * KV_GROUP)
}

/// Bytes of shared memory of `rope_append`.
pub const fn rope_append_shared(head_dim: u32, q8: bool) -> u32 {
    if q8 { 8 * head_dim * 4 } else { 0 }
}

/// Bytes of shared memory of `attention_*`, or of `attention_q8_*`.
pub const fn attention_shared(head_dim: u32, q8: bool) -> u32 {
    let depth = match (head_dim > 128, q8) {
        (true, false) => 2,
        (true, true) | (false, false) => 3,
        (false, true) => 5,
    };
    let row = if q8 { head_dim + 16 + scale_bytes(head_dim) } else { (head_dim + 8) * 2 };
    let rings = ATTENTION_WARPS * depth * 2 * 16 * row;
    let results = ATTENTION_WARPS * MANY_HEADS * (head_dim + 2) * 4 + 4;
    if results > rings { results } else { rings }
}

/// Bytes of shared memory of `attention_coop_*`.
pub const fn attention_coop_shared(head_dim: u32) -> u32 {
    2 * 2 * SPAN * (head_dim + 8) * 2
}

/// Most experts of a layer.
pub const EXPERTS_MAX: u32 = 1024;
/// Most experts of a token: `route` has one in each lane of a warp.
pub const TOP_K_MAX: u32 = 32;
/// Slots of a tile of `gemv_w4_8_experts_*`, and of the kernels for many rows.
pub const SLOTS_OF_TILES: [u32; 2] = [8, GEMM_TOKENS];

/// Tiles of `tile` slots that `tokens` tokens can need, whichever experts they choose; `u32::MAX` where it is more.
pub const fn expert_tiles(tile: u32, experts: u32, top_k: u32, tokens: u32) -> u32 {
    let pairs = tokens.saturating_mul(top_k);
    (pairs / tile).saturating_add(if experts < pairs { experts } else { pairs })
}

/// Bytes of shared memory of `route`.
pub const fn route_shared(experts: u32) -> u32 {
    ROUTE_WARPS * experts * 4
}

/// Bytes of shared memory of `group`.
pub const fn group_shared(experts: u32) -> u32 {
    (experts + 1) * 4
}

/// Bytes of shared memory of `stage` and `norm_rows`.
pub const BLOCK_SUM_SHARED: u32 = 33 * 4;
/// Bytes of shared memory of `sample_slices` and `sample_narrow`.
pub const SLICE_SHARED: u32 = SLICE * 12;
/// Bytes of shared memory of `sample_draw`.
pub const DRAW_SHARED: u32 = MOST_LEFT * 12;

/// Heads that `attention_*` and `attention_coop_*` are compiled for.
pub const HEAD_DIMS: [u32; 4] = [64, 96, 128, 256];

/// Names of the kernels for few and for many tokens over heads of one of [`HEAD_DIMS`], and a cache of [`KV_F16`] or
/// [`KV_Q8`]; `None` for other heads.
pub const fn attention_names(head_dim: u32, q8: bool) -> Option<[&'static str; 2]> {
    Some(match (head_dim, q8) {
        (64, false) => ["attention_64", "attention_coop_64"],
        (96, false) => ["attention_96", "attention_coop_96"],
        (128, false) => ["attention_128", "attention_coop_128"],
        (256, false) => ["attention_256", "attention_coop_256"],
        (64, true) => ["attention_q8_64", "attention_coop_q8_64"],
        (96, true) => ["attention_q8_96", "attention_coop_q8_96"],
        (128, true) => ["attention_q8_128", "attention_coop_q8_128"],
        (256, true) => ["attention_q8_256", "attention_coop_q8_256"],
        _ => return None,
    })
}

/// Machine code or assembly of all kernels.
#[derive(Clone, Copy)]
pub struct Image {
    /// What it is for, such as `sm_86`.
    pub name: &'static str,
    /// Compute capability, major and minor.
    capability: (u32, u32),
    /// Whether it runs on nothing else; others run on later minor versions of the same major one.
    exact: bool,
    deflated: &'static [u8],
}

macro_rules! image {
    ($name:literal, $major:literal, $minor:literal, $exact:literal) => {
        Image {
            name: $name,
            capability: ($major, $minor),
            exact: $exact,
            deflated: include_bytes!(concat!("../cuda/", $name, ".cubin.deflate")),
        }
    };
}

/// Machine code, by capability.
const IMAGES: &[Image] = &[
    image!("sm_75", 7, 5, false),
    image!("sm_80", 8, 0, false),
    image!("sm_86", 8, 6, false),
    image!("sm_89", 8, 9, false),
    image!("sm_90a", 9, 0, true),
    image!("sm_100", 10, 0, false),
    image!("sm_120", 12, 0, false),
];

/// Assembly for what comes later.
const ASSEMBLY: Image = Image {
    name: "compute_80",
    capability: (8, 0),
    exact: false,
    deflated: include_bytes!("../cuda/compute_80.ptx.deflate"),
};

impl Image {
    /// The image for a device of this compute capability; `None` for devices that are too old.
    pub fn of(major: u32, minor: u32) -> Option<Self> {
        let fits = |image: &&Image| match image.exact {
            true => image.capability == (major, minor),
            false => image.capability.0 == major && image.capability.1 <= minor,
        };
        let assembly = ((major, minor) >= ASSEMBLY.capability).then_some(ASSEMBLY);
        IMAGES.iter().rfind(fits).copied().or(assembly)
    }

    /// Every image.
    pub fn all() -> impl Iterator<Item = Self> {
        IMAGES.iter().copied().chain([ASSEMBLY])
    }

    /// The image as the driver takes it; assembly ends with a zero.
    ///
    /// # Panics
    /// Never: a test reads every image.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        flate2::read::DeflateDecoder::new(self.deflated).read_to_end(&mut bytes).expect("the image is a whole stream");
        bytes
    }
}

#[cfg(test)]
mod tests;
