//! The KV cache of a session: positions of its own, behind those that several sessions begin with and none writes.

use std::ops::Range;
use std::sync::Arc;

use awqua_shaders::cuda::{BLOCK_POSITIONS, SPAN};

use super::driver::{Buffer, Gpu, OtherRows, Rows, Stream};
use crate::backend::forks::Start;
use crate::backend::{KvType, Program, kv_bytes};
use crate::error::Result;

/// Positions that attention takes at once: what is shared is a multiple of them, so that each such block lies in one
/// cache and sums are the same whether positions are shared or not.
pub(super) const GRAIN: u32 = BLOCK_POSITIONS;
const _: () = assert!(GRAIN.is_multiple_of(SPAN));

/// Bytes of a cache of `positions` positions; its scales, if it has any, have room for a multiple of four.
pub(super) fn bytes(program: &Program, kv_type: KvType, positions: u32) -> u64 {
    let room =
        if kv_type == KvType::Q8 { positions.checked_next_multiple_of(4).unwrap_or(positions) } else { positions };
    kv_bytes(program, kv_type, room)
}

/// Keys and values of the positions that several sessions begin with.
pub(super) struct Prefix {
    buffer: Buffer,
    /// Positions, a multiple of [`GRAIN`].
    pub(super) len: u32,
}

impl Start for Prefix {
    fn len(&self) -> u32 {
        self.len
    }
}

impl Prefix {
    /// Allocates for `len` positions.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(gpu: &Arc<Gpu>, program: &Program, kv_type: KvType, len: u32) -> Result<Self> {
        let what = format!("a shared KV cache of {len} tokens");
        Ok(Self { buffer: gpu.buffer(&what, bytes(program, kv_type, len))?, len })
    }

    pub(super) fn address(&self) -> u64 {
        self.buffer.address()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.buffer.bytes()
    }

    pub(super) fn part(&self) -> Part<'_> {
        Part { buffer: &self.buffer, positions: 0..self.len }
    }
}

/// Consecutive positions and where their keys and values lie: (layers, keys then values, kv_heads, positions, head_dim),
/// then the scales if there are any.
#[derive(Clone)]
pub(super) struct Part<'a> {
    pub(super) buffer: &'a Buffer,
    pub(super) positions: Range<u32>,
}

/// Bytes of a cache's rows.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// Heads of keys and values of all layers.
    lines: usize,
    /// Of a position: elements or codes, and scales.
    codes: usize,
    scales: usize,
}

impl Form {
    pub(super) fn new(program: &Program, kv_type: KvType) -> Self {
        let shape = program.attention;
        Self {
            lines: 2 * (program.layers * shape.kv_heads) as usize,
            codes: kv_type.code_bytes(shape.head_dim) as usize,
            scales: kv_type.scale_bytes(shape.head_dim) as usize,
        }
    }

    /// Elements of `positions` of `part` as rows, and their scales; where the other side lies is for the caller to say.
    fn rows(self, part: &Part<'_>, positions: &Range<u32>) -> [Rows; 2] {
        let (all, skipped) = (part.positions.len(), (positions.start - part.positions.start) as usize);
        let rows = |start: usize, each: usize, room: usize| Rows {
            offset: start + skipped * each,
            width: positions.len() * each,
            rows: self.lines,
            pitch: room * each,
            other_offset: 0,
            other_pitch: 0,
        };
        [rows(0, self.codes, all), rows(self.lines * all * self.codes, self.scales, all.next_multiple_of(4))]
    }

    /// Rows of `positions` of `part`, whose other side is a snapshot of the first `n` positions: the elements of a line,
    /// then its scales.
    fn rows_of_snapshot(self, part: &Part<'_>, positions: &Range<u32>, n: u32) -> [Rows; 2] {
        let (n, first) = (n as usize, positions.start as usize);
        let other_pitch = n * (self.codes + self.scales);
        let [codes, scales] = self.rows(part, positions);
        [
            Rows { other_offset: first * self.codes, other_pitch, ..codes },
            Rows { other_offset: n * self.codes + first * self.scales, other_pitch, ..scales },
        ]
    }

    /// Copies what `part` has of the first `n` positions to a snapshot of them. Waits.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn save(self, stream: &Stream, part: &Part<'_>, n: u32, out: &mut [u8]) -> Result<()> {
        let positions = common(&part.positions, &(0..n));
        let rows = self.rows_of_snapshot(part, &positions, n);
        rows.into_iter().try_for_each(|rows| stream.copy_rows(part.buffer, rows, OtherRows::To(&mut *out)))
    }

    /// Takes from a snapshot of the first `n` positions what `part` has of them. Waits.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn load(self, stream: &Stream, part: &Part<'_>, n: u32, from: &[u8]) -> Result<()> {
        let positions = common(&part.positions, &(0..n));
        let rows = self.rows_of_snapshot(part, &positions, n);
        rows.into_iter().try_for_each(|rows| stream.copy_rows(part.buffer, rows, OtherRows::From(from)))
    }

    /// Queues copies of those of the first `n` positions that `from` and `to` have in common.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn copy(self, stream: &Stream, from: &Part<'_>, to: &Part<'_>, n: u32) -> Result<()> {
        let positions = common(&common(&from.positions, &to.positions), &(0..n));
        if positions.is_empty() {
            return Ok(());
        }
        let mut pairs = self.rows(from, &positions).into_iter().zip(self.rows(to, &positions));
        pairs.try_for_each(|(from_rows, to_rows)| {
            let rows = Rows { other_offset: to_rows.offset, other_pitch: to_rows.pitch, ..from_rows };
            stream.copy_rows(from.buffer, rows, OtherRows::Device(to.buffer))
        })
    }
}

/// Positions in both ranges, from within the first one if there are none.
fn common(a: &Range<u32>, b: &Range<u32>) -> Range<u32> {
    let start = b.start.clamp(a.start, a.end);
    start..b.end.clamp(start, a.end.max(start))
}
