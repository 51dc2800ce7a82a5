//! AArch64 inner loops: plain ones for single precision, which compilers turn into NEON, and products of bytes.

use super::integer::rows::{LANES, Rows};
use super::integer::{Inputs, Panel, i8mm, neon};
use super::kernels::{Kernels, Portable, TILE};
use super::vector::Outer;
use crate::tensor::Offset;

/// NEON with `dotprod`.
pub(super) struct Neon {
    /// Whether to use `i8mm`.
    i8mm: bool,
}

impl Neon {
    pub(super) fn new() -> Option<Self> {
        (std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod"))
            .then_some(Self { i8mm: false })
    }

    /// With `i8mm` too.
    pub(super) fn with_i8mm() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("i8mm").then(Self::new).flatten().map(|_| Self { i8mm: true })
    }
}

impl Kernels for Neon {
    fn name(&self) -> &'static str {
        if self.i8mm { "neon-i8mm" } else { "neon-dotprod" }
    }

    fn expand_w4(&self, words: &[u32], params: &[u32], group_size: usize, offset: Offset, out: &mut [f32]) {
        Portable.expand_w4(words, params, group_size, offset, out);
    }

    fn expand_f16(&self, bytes: &[u8], out: &mut [f32]) {
        Portable.expand_f16(bytes, out);
    }

    fn narrow_f16(&self, values: &[f32], out: &mut [half::f16]) {
        Portable.narrow_f16(values, out);
    }

    fn dot_tile(
        &self,
        w: &[f32],
        stride_w: usize,
        rows: usize,
        x: &[f32],
        stride_x: usize,
        cols: usize,
        k: usize,
        acc: &mut [[f32; TILE]; TILE],
    ) {
        Portable.dot_tile(w, stride_w, rows, x, stride_x, cols, k, acc);
    }

    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        Portable.dot(a, b)
    }

    fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        Portable.axpy(a, x, y);
    }

    fn exponentials(&self, x: &mut [f32]) -> (f32, f32) {
        Portable.exponentials(x)
    }

    fn expand_q8(&self, codes: &[i8], scales: &[f32], dim: usize, out: &mut [f32]) {
        Portable.expand_q8(codes, scales, dim, out);
    }

    fn expand_q8_lanes(&self, codes: &[i8], scales: &[f32], out: &mut [f32]) {
        Portable.expand_q8_lanes(codes, scales, out);
    }

    fn silu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        Portable.silu(gate, up, out);
    }

    fn gelu_tanh(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        Portable.gelu_tanh(gate, up, out);
    }

    fn outer(&self, a: (&[f32], usize), b: (&[f32], usize), c: (&mut [f32], usize), extents: Outer) {
        Portable.outer(a, b, c, extents);
    }

    fn round_span(&self, x: &[f32], codes: &mut [i16]) -> (f32, f32) {
        neon::round_span(x, codes)
    }

    #[cfg(test)]
    fn natural(&self, codes: &[i16]) -> Vec<i16> {
        neon::natural(codes)
    }

    fn gemv(&self, w: &Rows<'_>, block: usize, apart: usize, x: &Inputs<'_>, out: &mut [[f32; LANES]]) {
        x.check_row(w.shape(), false);
        // SAFETY: `self` proves NEON and its products of bytes, `i8mm` those of matrices of bytes.
        unsafe {
            match self.i8mm {
                true => i8mm::gemv(w, block, apart, x, out),
                false => neon::gemv(w, block, apart, x, out),
            }
        }
    }

    fn unpack(&self, w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
        // SAFETY: `self` proves NEON.
        unsafe {
            match self.i8mm {
                true => neon::unpack::<true>(w, block, first, panel),
                false => neon::unpack::<false>(w, block, first, panel),
            }
        }
    }

    fn gemm(&self, panel: &Panel, first: usize, x: &Inputs<'_>, sums: &mut [[f32; LANES]]) {
        // SAFETY: `self` proves NEON and its products of bytes, `i8mm` those of matrices of bytes.
        unsafe {
            match self.i8mm {
                true => i8mm::gemm(panel, first, x, sums),
                false => neon::gemm(panel, first, x, sums),
            }
        }
    }
}
