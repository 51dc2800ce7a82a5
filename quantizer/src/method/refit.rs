//! Scales fitted to codes.
//!
//! A scale was chosen for the range of its group before anything was rounded. Once the codes stand, the error of a row,
//! d H dᵀ with d = w - sum_g s_g u_g and H the second moments of the input, is a quadratic in the scales s_g of its
//! groups, whose codes less the zero point are u_g. It is minimised one group after the other, each knowing what the ones
//! before it left: s_g moves by (d H u_gᵀ) / (u_g H u_gᵀ). The file holds what it held before.

use super::Moments;
use crate::grid::{Grid, Step, half_scale};
use crate::math::{Threads, View, dot, gemm};

/// Scales of the (n, k) matrix `w` for these codes, in one pass over the groups. `damp` is the share of the mean of the
/// diagonal that is added to the diagonal of the moments.
///
/// # Panics
/// If shapes do not fit or the moments hold diagonal blocks only.
pub fn refit(
    threads: Threads,
    w: &[f32],
    grid: Grid,
    codes: &[u8],
    mut steps: Vec<Step>,
    moments: &Moments,
    damp: f32,
) -> Vec<Step> {
    let k = moments.k;
    let group = grid.group(k);
    let groups = k / group;
    let n = w.len() / k;
    assert!(w.len() == n * k && codes.len() == w.len() && steps.len() == n * groups, "one code a weight");
    let mut h = moments.diagonal_block(0, k);
    let mean = (0..k).map(|i| h[i * k + i]).sum::<f32>() / k as f32;
    (0..k).for_each(|i| h[i * k + i] += damp * mean);

    let mut d = w.to_vec();
    threads.rows(&mut d, group, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(group).enumerate() {
            let step = steps[first + i];
            for (d, &code) in row.iter_mut().zip(&codes[(first + i) * group..]) {
                *d -= (f32::from(code) - step.zero) * step.scale;
            }
        }
    });
    // d H, of which only the columns still to come are kept up to date.
    let mut slope = vec![0.0; n * k];
    gemm(threads, 1.0, View::new(&d, k), View::new(&h, k), 0.0, &mut slope, k);
    drop(d);
    let (mut units, mut curved) = (vec![0.0f32; n * group], vec![0.0f32; n * group]);
    for g in 0..groups {
        let at = g * group;
        for (row, units) in units.chunks_exact_mut(group).enumerate() {
            let zero = steps[row * groups + g].zero;
            let codes = &codes[row * k + at..][..group];
            units.iter_mut().zip(codes).for_each(|(unit, &code)| *unit = f32::from(code) - zero);
        }
        let own = View::strided(&h[at * k + at..], group, k).rows(group);
        gemm(threads, 1.0, View::new(&units, group), own, 0.0, &mut curved, group);
        for row in 0..n {
            let units = &mut units[row * group..][..group];
            let step = &mut steps[row * groups + g];
            let before = step.scale;
            let ratio = dot(units, &slope[row * k + at..][..group]) / dot(units, &curved[row * group..][..group]);
            // All codes may be the zero point, and a direction the calibration never took says nothing.
            if ratio.is_finite() {
                step.scale = half_scale((before + ratio).clamp(0.5 * before, 2.0 * before));
            }
            units.iter_mut().for_each(|unit| *unit *= step.scale - before);
        }
        let next = at + group;
        if next < k {
            let across = View::strided(&h[at * k + next..], k - next, k).rows(group);
            gemm(threads, -1.0, View::new(&units, group), across, 1.0, &mut slope[next..], k);
        }
    }
    steps
}
