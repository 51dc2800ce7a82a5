//! Twin of `gemv_w4_rows.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Rows of a workgroup.
pub const ROWS: u32 = 4;
/// Outputs of a workgroup.
pub const WIDTH: u32 = 64;

params! {
    /// Uniform at binding 0; up to `stage_quads` as in [`gemv_w4::Params`].
    Params {
        /// Outputs of this part; with [`crate::FLAG_GLU`] gates and ups together.
        n: u32,
        /// Inputs; a multiple of 8.
        k: u32,
        /// Chunks of 32 inputs, the last one padded.
        chunks: u32,
        /// Inputs of a group.
        group_size: u32,
        /// [`gemv_w4::group_shift`] of the group size.
        group_shift: u32,
        /// Groups of a row.
        groups: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column of this part.
        out_offset: u32,
        /// First element of the bias of these outputs.
        bias_offset: u32,
        /// As in [`gemv_w4::Params`], and [`crate::FLAG_GLU`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Added to the mean of squares under [`crate::FLAG_NORM`].
        eps: f32,
        /// First element of the norm weights of these outputs.
        norm_offset: u32,
        /// Quads of a row of staged outputs.
        stage_quads: u32,
        /// [`crate::Activation`], with [`crate::FLAG_GLU`].
        activation: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4_rows",
    body: include_str!("gemv_w4_rows.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::W4,
        Prelude::Elem,
        Prelude::Stage,
        Prelude::StageEight,
        Prelude::GemvW4Chunk,
        Prelude::Activation,
    ],
    constants: &[("WG", WG), ("ROWS", ROWS)],
    sizes: &[&[("WG", 512)]],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    let width = if params.flags & FLAG_GLU != 0 { params.n / 2 } else { params.n };
    let of_tile = if params.flags & FLAG_GLU != 0 { WIDTH / 2 } else { WIDTH };
    crate::grid(width.div_ceil(of_tile) * rows.div_ceil(ROWS), 1)
}

/// As [`gemv_w4::cost`].
pub fn cost(params: &Params, rows: u32) -> Cost {
    w4::cost(params.n, params.k, params.groups, rows)
}

/// The cases of [`gemv_w4`], and more rows.
pub fn cases() -> Vec<gemv_w4::Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| gemv_w4::Case { n, k, group_size, tokens, row_mode, flags };
    let mut cases = gemv_w4::cases();
    cases.extend([
        case(70, 256, 128, 9, all, FLAG_NORM | FLAG_STAGE | FLAG_STAGE_NORM | FLAG_BIAS | FLAG_ACCUMULATE),
        case(130, 640, 32, 6, all, FLAG_STAGE),
        case(40, 96, 24, 15, RowMode::Logits, FLAG_BIAS),
    ]);
    cases
}

/// Those of [`gemv_w4_swiglu`], and more rows.
pub fn glu_cases() -> Vec<gemv_w4::Case> {
    let mut cases = gemv_w4_swiglu::cases();
    for (case, tokens) in cases.iter_mut().zip([4, 3, 7, 2, 5]) {
        case.tokens = tokens;
    }
    cases
}

fn of_glu(trial: &mut Trial) {
    let other: gemv_w4_swiglu::Params = bytemuck::pod_read_unaligned(&trial.params);
    let params = Params {
        n: other.n,
        k: other.k,
        chunks: other.chunks,
        group_size: other.group_size,
        group_shift: other.group_shift,
        groups: other.groups,
        bias_offset: other.bias_offset,
        flags: other.flags | FLAG_GLU,
        row_mode: other.row_mode,
        eps: other.eps,
        stage_quads: other.stage_quads,
        activation: other.activation,
        ..Params::default()
    };
    trial.params = bytemuck::bytes_of(&params).to_vec();
    // Nothing goes to `out`, which lies in front of what is staged.
    let out = vec![trial::POISON; 4];
    trial.storage.insert(4, out.clone());
    trial.expected.iter_mut().for_each(|expected| expected.binding += 1);
    trial.expected.push(trial::Expected::exact(6, out));
}

/// Random runs of cases, plain ones and those with [`FLAG_GLU`], that fit the variant; shared with the kernel on matrix
/// units.
pub(crate) fn trials_of(
    plain: Vec<gemv_w4::Case>,
    glu: Vec<gemv_w4::Case>,
    grid: fn(&Params, u32) -> [u32; 3],
    variant: Variant,
    rng: &mut Rng,
) -> Vec<Trial> {
    let fits = |case: &gemv_w4::Case| Groups::of(case.group_size, case.k) <= variant.groups;
    let mut trials: Vec<_> = plain.into_iter().filter(fits).map(|case| gemv_w4::trial(case, variant, rng)).collect();
    trials.extend(gemv_w4_swiglu::trials_of(glu, variant, rng).into_iter().map(|mut trial| {
        of_glu(&mut trial);
        trial
    }));
    for trial in &mut trials {
        // The blocks of plain ones differ from those of one row in nothing but the padding, which is zero.
        let params: Params = bytemuck::pod_read_unaligned(&trial.params);
        trial.grid = grid(&params, RowMode::from_u32(params.row_mode).count(&trial.step));
    }
    trials
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    trials_of(cases(), glu_cases(), grid, variant, rng)
}
