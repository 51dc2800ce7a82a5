//! [`super`]'s products of many rows with AMX: tiles of bytes instead of vectors of 16-bit numbers.
//!
//! A tile of weights is 64 columns of sixteen rows, one of activations 64 bytes of sixteen tokens; a `tdpb` multiplies
//! them in 16 cycles, 1,024 multiplications a cycle. Activations keep their 16 bits: the low and the high bytes of a span
//! lie in planes of their own ([`split`]) and have tiles of sums of their own, so that `256 * high + low` is the integer
//! that a product of 16-bit numbers has, and results are those of [`super::avx512`] to the bit.
//!
//! Sums leave tiles through memory once a span, and that is what bounds a product: a store takes a tile as long as a
//! product, and the vector units 3 cycles for sixteen sums, 48 a tile. To keep all units at work, tiles are loaded before
//! the products of the ones loaded last, and the sums that leave are those stored two spans ago, between the products of a
//! span and their stores: a fifth faster than with loads and products in turn.
//!
//! Tiles hold state that Linux keeps for a thread only after the process asked for it, and that makes every switch of
//! threads dearer while it is there. [`gemm`] releases it before it returns, so a host's thread never keeps any.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::avx512::{bytes_of_four, params};
use super::rows::{Codes, LANES, OCTET, Rows};
use super::{Inputs, Panel};

/// Tokens of a tile.
const TOKENS: usize = 16;
/// Bytes of a row of a tile.
const LINE: usize = 64;
/// Tokens from which on there are planes. Fewer go through vectors, which read weights as they are for one row; of
/// experts many have one.
const LEAST: usize = 4;
/// Spans between the one that tiles multiply and the one whose sums leave.
const LAG: usize = 2;

/// Whether activations are split into planes where at most `together` of them meet a matrix.
pub(in crate::backend::cpu) fn takes(together: usize) -> bool {
    together >= LEAST
}

/// Columns of a tile, a number that divides those of a span.
const fn columns(span: usize) -> usize {
    if span.is_multiple_of(LINE) { LINE } else { LINE / 2 }
}

/// Whether the processor has tiles of bytes, and the system lets this process use them.
pub(in crate::backend::cpu) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| supported() && permitted())
}

/// What `is_x86_feature_detected!` will tell once its names for AMX are stable.
fn supported() -> bool {
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    /// Configuration and data of tiles, among the states that the system saves.
    const STATES: u64 = 3 << 17;
    if !is_x86_feature_detected!("xsave") || __cpuid(0).eax < 7 {
        return false;
    }
    // Whether the system lets programs ask which states it saves.
    let osxsave = __cpuid(1).ecx & 1 << 27 != 0;
    // SAFETY: there is such a register by the two features.
    let saved = || unsafe { _xgetbv(0) } & STATES == STATES;
    __cpuid_count(7, 0).edx & (TILE | INT8) == TILE | INT8 && osxsave && saved()
}

/// Asks Linux for the state of tiles, which its threads otherwise have no memory for.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: a system call that reads no memory of ours; the kernel changes these registers only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

/// Elsewhere tiles are left alone.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Whether this thread has state of tiles; `None` where the processor does not tell.
#[cfg(test)]
pub(super) fn in_use() -> Option<bool> {
    let tells = available() && __cpuid_count(13, 1).eax & 1 << 2 != 0;
    // SAFETY: there is such a register by the feature.
    tells.then(|| unsafe { _xgetbv(1) } & 1 << 18 != 0)
}

/// Splits the columns of a span, in the order of pairs, into planes of low and of high bytes: as many of each as a tile has
/// columns, an octet's in the order 0, 2, 4, 6, 1, 3, 5, 7.
///
/// # Panics
/// Unless these are a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::backend::cpu) fn split(codes: &mut [i16]) {
    assert!(codes.len().is_multiple_of(LINE / 2));
    const ORDER: [u8; 16] = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15];
    // SAFETY: sixteen bytes.
    let order = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(ORDER.as_ptr().cast()) });
    let whole = columns(codes.len()) == LINE;
    let (mut at, end) = (codes.as_mut_ptr().cast::<__m512i>(), codes.as_mut_ptr_range().end.cast::<__m512i>());
    while at < end {
        // SAFETY: one vector is left by the length just checked, and a second where tiles have 64 columns.
        unsafe {
            let first = _mm512_loadu_si512(at);
            let (low, high) = (_mm512_cvtepi16_epi8(first), _mm512_cvtepi16_epi8(_mm512_srli_epi16::<8>(first)));
            if !whole {
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
                _mm512_storeu_si512(at, _mm512_shuffle_epi8(both, order));
                at = at.add(1);
                continue;
            }
            let second = _mm512_loadu_si512(at.add(1));
            let more = (_mm512_cvtepi16_epi8(second), _mm512_cvtepi16_epi8(_mm512_srli_epi16::<8>(second)));
            let low = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), more.0);
            let high = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(high), more.1);
            _mm512_storeu_si512(at, _mm512_shuffle_epi8(low, order));
            _mm512_storeu_si512(at.add(1), _mm512_shuffle_epi8(high, order));
            at = at.add(2);
        }
    }
}

/// See [`super::super::kernels::Kernels::unpack`]; of each of the panel's blocks, as tiles: four columns of sixteen rows are
/// a line.
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::backend::cpu) fn unpack(w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
    let shape = w.shape();
    let span = panel.span;
    let lines: &mut [u8] = bytemuck::cast_slice_mut(&mut panel.codes);
    let mut spans = lines.chunks_exact_mut(span * LANES).zip(panel.s.iter_mut().zip(&mut panel.b));
    for block in block..block + panel.blocks {
        let bytes = w.block(block);
        for i in first..first + panel.spans {
            let Some((lines, (s, b))) = spans.next() else { return };
            let column = i * span;
            let group = &bytes[column / shape.group_size * shape.group_bytes()..][..shape.group_bytes()];
            let octet = column % shape.group_size / OCTET;
            let codes =
                &group[shape.param_bytes() + octet * shape.octet_bytes()..][..span / OCTET * shape.octet_bytes()];
            // SAFETY: the numbers come first in the bytes of a group; stores to arrays of sixteen; octets of codes of the
            // size that `octet_bytes` says, which become two lines.
            unsafe {
                let numbers = params(w, group.as_ptr());
                _mm512_storeu_ps(s.as_mut_ptr(), numbers.0);
                _mm512_storeu_ps(b.as_mut_ptr(), numbers.1);
                for (codes, to) in codes.chunks_exact(shape.octet_bytes()).zip(lines.chunks_exact_mut(2 * LINE)) {
                    let [even, odd] = match shape.codes {
                        Codes::Four(_) => bytes_of_four(codes.as_ptr()),
                        Codes::Eight => bytes_of_octet(codes.as_ptr()),
                    };
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), even);
                    _mm512_storeu_si512(to.as_mut_ptr().add(LINE).cast(), odd);
                }
            }
        }
    }
}

/// The codes of an octet of 8 bits, those of even and of odd columns.
///
/// # Safety
/// 128 bytes at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn bytes_of_octet(at: *const u8) -> [__m512i; 2] {
    let order = _mm512_set1_epi32(0x03_01_02_00);
    let within = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
    // SAFETY: by the caller's promise.
    let pairs = |i: usize| _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(at.cast::<__m256i>().add(i)) });
    [0, 1].map(|t| {
        // Columns t, t + 4, t + 2, t + 6.
        let all = _mm512_or_si512(pairs(t), _mm512_slli_epi32::<16>(pairs(t + 2)));
        _mm512_shuffle_epi8(all, _mm512_add_epi8(order, within))
    })
}

/// What tiles are: 0 and 1 sums, 4 and 7 weights, the others activations.
#[repr(C, align(64))]
struct Shapes([u8; 64]);

impl Shapes {
    /// For `tokens` rows of activations, `columns` at a time.
    fn new(tokens: usize, columns: usize) -> Self {
        let mut shapes = [0; 64];
        shapes[0] = 1;
        for tile in 0..8 {
            let (rows, bytes) = match tile {
                0 | 1 => (tokens, LINE),
                4 | 7 => (columns / 4, LINE),
                _ => (tokens, columns),
            };
            shapes[16 + 2 * tile] = bytes as u8;
            shapes[48 + tile] = rows as u8;
        }
        Self(shapes)
    }

    /// # Safety
    /// [`available`], and [`release`] before the thread goes elsewhere.
    unsafe fn set(&self) {
        // SAFETY: reads these 64 bytes; the rest is the caller's promise.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &self.0, options(nostack, preserves_flags, readonly));
        }
    }
}

/// Leaves no state of tiles.
///
/// # Safety
/// [`available`].
unsafe fn release() {
    // SAFETY: touches tiles only, which no compiled code uses.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
}

/// Integer sums of a span: those of low and of high bytes, (tokens, 16).
#[repr(C, align(64))]
struct Sums([[[i32; LANES]; TOKENS]; 2]);

impl Sums {
    /// Takes them from the tiles.
    ///
    /// # Safety
    /// Tiles have the shapes for at most [`TOKENS`] tokens.
    #[inline]
    unsafe fn take(&mut self) {
        // SAFETY: writes these two arrays.
        unsafe {
            asm!(
                "tilestored [{sums} + 1 * {line}], tmm0",
                "tilestored [{sums} + 1 * {line} + 1024], tmm1",
                sums = in(reg) self, line = in(reg) LINE,
                options(nostack, preserves_flags)
            );
        }
    }
}

macro_rules! operands {
    ($load:ident, $multiply:ident, $low:literal, $high:literal, $weights:literal) => {
        /// Loads activations at `x`, whose rows are `stride` bytes apart, and weights.
        ///
        /// # Safety
        /// Tiles of COLUMNS columns of both are there, and tiles have the shapes for them.
        #[inline]
        unsafe fn $load<const COLUMNS: usize>(x: *const u8, stride: usize, weights: *const u8) {
            // SAFETY: reads what the caller promises; tiles are nobody else's.
            unsafe {
                asm!(
                    concat!("tileloadd ", $weights, ", [{weights} + 1 * {line}]"),
                    concat!("tileloadd ", $low, ", [{x} + 1 * {stride}]"),
                    concat!("tileloadd ", $high, ", [{x} + 1 * {stride} + {columns}]"),
                    weights = in(reg) weights, line = in(reg) LINE, x = in(reg) x, stride = in(reg) stride,
                    columns = const COLUMNS,
                    options(nostack, preserves_flags, readonly)
                );
            }
        }

        /// Adds the products of what was loaded to the sums, or begins them.
        ///
        /// # Safety
        /// Tiles have shapes.
        #[inline]
        unsafe fn $multiply(begin: bool) {
            // SAFETY: touches tiles only, which are nobody else's.
            unsafe {
                if begin {
                    asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags, nomem));
                }
                asm!(
                    concat!("tdpbusd tmm0, ", $low, ", ", $weights),
                    concat!("tdpbssd tmm1, ", $high, ", ", $weights),
                    options(nostack, preserves_flags, nomem)
                );
            }
        }
    };
}

// Two sets of tiles: one is loaded while the other is multiplied.
operands!(load_even, multiply_even, "tmm2", "tmm3", "tmm4");
operands!(load_odd, multiply_odd, "tmm5", "tmm6", "tmm7");

/// The way of sums out of tiles, span by span of all blocks of a panel.
struct Leaving<'a> {
    panel: &'a Panel,
    rows: usize,
    /// Of the first row: scales of the activations and their sums, from the first span on; `stride` numbers from a row's
    /// to the next one's.
    scales: *const f32,
    sums: *const f32,
    stride: usize,
    /// The block's sums of the first row.
    to: *mut [f32; LANES],
    /// Rows of a block.
    tokens: usize,
    /// The next span, of its block and of all blocks.
    span: usize,
    index: usize,
}

impl Leaving<'_> {
    /// Adds the sums of the next span.
    ///
    /// # Safety
    /// There is one, and all rows have sums and numbers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(&mut self, lanes: &Sums) {
        // SAFETY: arrays of sixteen; the caller's promise.
        unsafe {
            let s = _mm512_loadu_ps(self.panel.s.get_unchecked(self.index).as_ptr());
            let b = _mm512_loadu_ps(self.panel.b.get_unchecked(self.index).as_ptr());
            let (mut scale, mut sum) = (self.scales.add(self.span), self.sums.add(self.span));
            let [low, high] = lanes.0.each_ref().map(|lanes| lanes.as_ptr());
            for t in 0..self.rows {
                let low = _mm512_load_si512(low.add(t).cast());
                let high = _mm512_load_si512(high.add(t).cast());
                let lanes = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high), low));
                let to = self.to.add(t).cast();
                let all = _mm512_fmadd_ps(lanes, _mm512_mul_ps(s, _mm512_set1_ps(*scale)), _mm512_loadu_ps(to));
                _mm512_storeu_ps(
                    to,
                    if self.panel.offsets { _mm512_fmadd_ps(b, _mm512_set1_ps(*sum), all) } else { all },
                );
                (scale, sum) = (scale.wrapping_add(self.stride), sum.wrapping_add(self.stride));
            }
        }
        self.index += 1;
        self.span += 1;
        if self.span == self.panel.spans {
            self.span = 0;
            self.to = self.to.wrapping_add(self.tokens);
        }
    }
}

/// See [`super::super::kernels::Kernels::gemm`].
///
/// # Safety
/// [`available`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::backend::cpu) unsafe fn gemm(panel: &Panel, first: usize, x: &Inputs<'_>, sums: &mut [[f32; LANES]]) {
    let tokens = x.codes.len() / x.k;
    x.check_planes(panel, first, tokens);
    assert!(sums.len() == panel.blocks * tokens && panel.span.is_multiple_of(LINE / 2));
    let columns = columns(x.span);
    let mut buffers = [const { Sums([[[0; LANES]; TOKENS]; 2]) }; LAG + 1];
    let mut shaped = 0;
    for t in (0..tokens).step_by(TOKENS) {
        let rows = t..tokens.min(t + TOKENS);
        // SAFETY: tiles are available by the caller's promise, and released below. These rows are in `x` and `sums`, with
        // the columns of the panel, by the checks above; tiles have the shapes for them.
        unsafe {
            if rows.len() != shaped {
                shaped = rows.len();
                Shapes::new(shaped, columns).set();
            }
            match columns {
                LINE => tile::<LINE>(panel, first, x, rows, sums, &mut buffers),
                _ => tile::<{ LINE / 2 }>(panel, first, x, rows, sums, &mut buffers),
            }
        }
    }
    // SAFETY: by the caller's promise.
    unsafe { release() };
}

/// Adds the products of all blocks of the panel with at most [`TOKENS`] rows of `x`.
///
/// # Safety
/// `x` and `sums` have these rows, `x` the columns of the spans from `first` on that the panel has; tiles have the shapes
/// for so many rows and COLUMNS columns.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn tile<const COLUMNS: usize>(
    panel: &Panel,
    first: usize,
    x: &Inputs<'_>,
    rows: Range<usize>,
    sums: &mut [[f32; LANES]],
    buffers: &mut [Sums; LAG + 1],
) {
    let stride = x.k / x.span;
    let number = rows.start * stride + first;
    let mut leaving = Leaving {
        panel,
        rows: rows.len(),
        scales: x.scales[number..].as_ptr(),
        sums: x.sums[number..].as_ptr(),
        stride,
        to: sums[rows.start..].as_mut_ptr(),
        tokens: sums.len() / panel.blocks,
        span: 0,
        index: 0,
    };
    let activations = x.codes[rows.start * x.k + first * x.span..].as_ptr().cast::<u8>();
    let weights = panel.codes.as_ptr().cast::<u8>();
    // Tiles of a span, of a block and of all blocks.
    let of_span = x.span / COLUMNS;
    let of_block = panel.spans * of_span;
    let all = panel.blocks * of_block;
    let spans = panel.blocks * panel.spans;
    let (mut next, mut next_of_block, mut of_this_span, mut multiplied) = (0, 0, 0, 0);
    // SAFETY: `next` is below `all`, so these tiles are there by the caller's promise. A span's sums leave after they were
    // stored, before their buffer is written again, and each once.
    unsafe {
        load_even::<COLUMNS>(activations, 2 * x.k, weights);
        for i in 0..all {
            // Behind the last one the first is loaded again, for nothing.
            next = if i + 1 < all { next + 1 } else { 0 };
            next_of_block = if next_of_block + 1 < of_block { next_of_block + 1 } else { 0 };
            let (x_next, weights_next) =
                (activations.add(2 * COLUMNS * next_of_block), weights.add(LANES * COLUMNS * next));
            if i % 2 == 0 {
                load_odd::<COLUMNS>(x_next, 2 * x.k, weights_next);
                multiply_even(of_this_span == 0);
            } else {
                load_even::<COLUMNS>(x_next, 2 * x.k, weights_next);
                multiply_odd(of_this_span == 0);
            }
            of_this_span += 1;
            if of_this_span == of_span {
                of_this_span = 0;
                if multiplied >= LAG {
                    leaving.add(&buffers[(multiplied - LAG) % (LAG + 1)]);
                }
                buffers[multiplied % (LAG + 1)].take();
                multiplied += 1;
            }
        }
        for span in spans.saturating_sub(LAG)..spans {
            leaving.add(&buffers[span % (LAG + 1)]);
        }
    }
}
