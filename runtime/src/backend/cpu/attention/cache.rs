//! The KV cache of a layer: where keys and values are, in which type, and which positions forks share.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use memmap2::MmapMut;

use super::super::kernels::Kernels;
use super::super::pool::Parts;
use super::super::{vector, zero_pages};
use crate::backend::{AttentionShape, KvType, Q8_GROUP};
use crate::error::Result;

/// Positions whose keys are stored side by side.
pub(in super::super) const LANES: usize = 16;

/// Where a layer's keys and values are.
///
/// Values are (kv_heads, positions, head_dim). Keys are (kv_heads, positions / 16, head_dim, 16), so that sixteen scores
/// are sums of the lanes of one vector. Positions are those of the context, rounded up to a multiple of 16. Scales of
/// [`KvType::Q8`] lie behind the codes in the same order, with groups of [`Q8_GROUP`] elements in the place of elements.
#[derive(Clone, Copy)]
pub(in super::super) struct Layout {
    kv_heads: usize,
    positions: usize,
    dim: usize,
    kv_type: KvType,
}

impl Layout {
    pub(in super::super) fn new(shape: &AttentionShape, context: usize, kv_type: KvType) -> Option<Self> {
        let positions = context.checked_next_multiple_of(LANES)?;
        Some(Self { kv_heads: shape.kv_heads as usize, positions, dim: shape.head_dim as usize, kv_type })
    }

    /// Elements of all keys, or of all values.
    fn len(&self) -> Option<usize> {
        self.kv_heads.checked_mul(self.dim)?.checked_mul(self.positions)
    }

    /// Bytes of all keys, or of all values.
    pub(in super::super) fn bytes(&self) -> Option<usize> {
        let n = self.len()?;
        match self.kv_type {
            KvType::F16 => n.checked_mul(2),
            KvType::F32 => n.checked_mul(4),
            KvType::Q8 => n.checked_add(self.kv_heads.checked_mul(self.groups() * 2)?.checked_mul(self.positions)?),
        }
    }

    /// Groups of a head, which have a scale each.
    fn groups(&self) -> usize {
        self.dim.div_ceil(Q8_GROUP)
    }

    /// The first of a position's values, of which a position has `per_position`.
    fn value(&self, head: usize, position: usize, per_position: usize) -> usize {
        (head * self.positions + position) * per_position
    }

    /// The first number of a position's key, of which a position has `per_position`; the others are [`LANES`] apart.
    fn key(&self, head: usize, position: usize, per_position: usize) -> usize {
        (head * self.positions + position / LANES * LANES) * per_position + position % LANES
    }
}

/// Keys (or values) of one layer. Pages of their own: a cache is large and fills slowly, and memory from the allocator may
/// have to be cleared, and so become resident, at once.
struct Store(MmapMut);

impl Store {
    fn new(layout: &Layout) -> Result<Self> {
        Ok(Self(zero_pages(layout.bytes(), "the KV cache")?))
    }

    /// The codes and the scales of [`KvType::Q8`].
    fn q8(&self, layout: &Layout) -> (&[i8], &[u8]) {
        let (codes, scales) = self.0.split_at(layout.len().unwrap_or(0));
        (bytemuck::cast_slice(codes), scales)
    }
}

/// Keys and values of one layer.
struct Pair {
    keys: Store,
    values: Store,
}

impl Pair {
    fn new(layout: &Layout) -> Result<Self> {
        Ok(Self { keys: Store::new(layout)?, values: Store::new(layout)? })
    }
}

/// KV cache of one layer: leading positions may be shared with forks, the others are its own. Every store has room for
/// the whole context and the same layout; pages never written cost nothing.
pub(in super::super) struct Cache {
    /// Positions before the end belong to the store, unless an earlier entry has them; ends ascend.
    shared: Vec<(Arc<Pair>, usize)>,
    own: Pair,
    layout: Layout,
}

impl Cache {
    pub(in super::super) fn new(layout: Layout) -> Result<Self> {
        Ok(Self { shared: Vec::new(), own: Pair::new(&layout)?, layout })
    }

    /// A cache that shares the first `positions`; both write what follows to memory of their own.
    pub(in super::super) fn fork(&mut self, positions: usize) -> Result<Self> {
        let fork = Pair::new(&self.layout)?;
        self.truncate(positions);
        if self.shared.last().map_or(0, |(_, end)| *end) < positions {
            let own = Pair::new(&self.layout)?;
            self.shared.push((Arc::new(std::mem::replace(&mut self.own, own)), positions));
        }
        Ok(Self { shared: self.shared.clone(), own: fork, layout: self.layout })
    }

    /// Stops sharing positions from `positions` on, which are about to be written.
    pub(in super::super) fn truncate(&mut self, positions: usize) {
        let mut before = 0;
        self.shared.retain_mut(|(_, end)| {
            *end = (*end).min(positions);
            let keep = *end > before;
            before = *end;
            keep
        });
    }

    /// The store of position `at`, and the end of the positions it has.
    fn at(&self, at: usize) -> (&Pair, usize) {
        match self.shared.iter().find(|(_, end)| at < *end) {
            Some((pair, end)) => (pair, *end),
            None => (&self.own, usize::MAX),
        }
    }

    /// For threads that write keys and values together.
    pub(super) fn writer(&mut self) -> Writer<'_> {
        let Pair { keys, values } = &mut self.own;
        Writer { keys: Parts::new(&mut keys.0), values: Parts::new(&mut values.0), layout: self.layout }
    }

    /// The keys of a block of [`LANES`] positions of which `position` is one, (head_dim, 16), and the end of the
    /// positions that are in the same memory. What is not in f32 goes through `widened`.
    pub(super) fn keys<'a>(
        &'a self,
        kernels: &dyn Kernels,
        head: usize,
        position: usize,
        widened: &'a mut [f32],
    ) -> (&'a [f32], usize) {
        let (store, end) = self.at(position);
        let layout = &self.layout;
        let first = position / LANES * LANES;
        let at = layout.key(head, first, layout.dim);
        let len = LANES * layout.dim;
        let keys = match layout.kv_type {
            KvType::F16 => widen_f16(kernels, &store.keys.0, at, len, widened),
            KvType::F32 => &bytemuck::cast_slice::<u8, f32>(&store.keys.0)[at..at + len],
            KvType::Q8 => {
                let (codes, scales) = store.keys.q8(layout);
                let (widened, rest) = widened.split_at_mut(len);
                let scales =
                    widen_f16(kernels, scales, layout.key(head, first, layout.groups()), LANES * layout.groups(), rest);
                kernels.expand_q8_lanes(&codes[at..at + len], scales, widened);
                widened
            }
        };
        (keys, end)
    }

    /// The values of the first positions of `positions`, (n, head_dim): of as many as are in the same memory. What is
    /// not in f32 goes through `widened`.
    pub(super) fn values<'a>(
        &'a self,
        kernels: &dyn Kernels,
        head: usize,
        positions: Range<usize>,
        widened: &'a mut [f32],
    ) -> (&'a [f32], usize) {
        let (store, end) = self.at(positions.start);
        let layout = &self.layout;
        let n = positions.end.min(end) - positions.start;
        let at = layout.value(head, positions.start, layout.dim);
        let len = n * layout.dim;
        let values = match layout.kv_type {
            KvType::F16 => widen_f16(kernels, &store.values.0, at, len, widened),
            KvType::F32 => &bytemuck::cast_slice::<u8, f32>(&store.values.0)[at..at + len],
            KvType::Q8 => {
                let (codes, scales) = store.values.q8(layout);
                let (widened, rest) = widened.split_at_mut(len);
                let groups = layout.groups();
                let scales = widen_f16(kernels, scales, layout.value(head, positions.start, groups), n * groups, rest);
                kernels.expand_q8(&codes[at..at + len], scales, layout.dim, widened);
                widened
            }
        };
        (values, n)
    }

    /// Copies the first `positions` to `out`, see [`crate::backend::Runner::save_kv`]: keys, then values.
    pub(in super::super) fn save(&self, positions: usize, out: &mut [u8]) {
        if self.layout.kv_type == KvType::Q8 {
            // What pads the scales of a position.
            out.fill(0);
        }
        let (keys, values) = out.split_at_mut(out.len() / 2);
        for (out, is_key) in [(keys, true), (values, false)] {
            self.layout.each(positions, out.len(), is_key, &mut |position, store_at, step, size, to| {
                let (pair, _) = self.at(position);
                let store = if is_key { &pair.keys } else { &pair.values };
                let from = store.0[store_at..].chunks(step);
                out[to].chunks_exact_mut(size).zip(from).for_each(|(to, from)| to.copy_from_slice(&from[..size]));
            });
        }
    }

    /// Takes back what [`Self::save`] gave.
    pub(in super::super) fn load(&mut self, positions: usize, bytes: &[u8]) {
        self.truncate(0);
        let (keys, values) = bytes.split_at(bytes.len() / 2);
        for (bytes, is_key) in [(keys, true), (values, false)] {
            let store = if is_key { &mut self.own.keys } else { &mut self.own.values };
            self.layout.each(positions, bytes.len(), is_key, &mut |_, store_at, step, size, from| {
                let to = store.0[store_at..].chunks_mut(step);
                bytes[from].chunks_exact(size).zip(to).for_each(|(from, to)| to[..size].copy_from_slice(from));
            });
        }
    }
}

/// The cache's own memory, of which threads write positions of their own.
pub(super) struct Writer<'a> {
    keys: Parts<'a, u8>,
    values: Parts<'a, u8>,
    layout: Layout,
}

impl Writer<'_> {
    /// Takes the key and the value of a head at a position.
    ///
    /// # Safety
    /// No two threads write positions of the same [`LANES`], those from a multiple of that many on.
    pub(super) unsafe fn write(
        &self,
        kernels: &dyn Kernels,
        head: usize,
        position: usize,
        (key, value): (&[f32], &[f32]),
    ) {
        let layout = &self.layout;
        let (block, lane) = (position / LANES * LANES, position % LANES);
        // Bytes of `per_position` numbers of `size` bytes from the byte `start` on: of the key's block, and of the value.
        // SAFETY: of this thread alone, by the caller's promise.
        let keys = |start: usize, per_position: usize, size: usize| unsafe {
            let at = start + layout.key(head, block, per_position) * size;
            self.keys.part(at, LANES * per_position * size)
        };
        // SAFETY: as above.
        let values = |start: usize, per_position: usize, size: usize| unsafe {
            self.values.part(start + layout.value(head, position, per_position) * size, per_position * size)
        };
        match layout.kv_type {
            KvType::F16 => {
                let keys = &mut bytemuck::cast_slice_mut::<u8, f16>(keys(0, layout.dim, 2))[lane..];
                keys.iter_mut().step_by(LANES).zip(key).for_each(|(to, value)| *to = f16::from_f32(*value));
                kernels.narrow_f16(value, bytemuck::cast_slice_mut(values(0, layout.dim, 2)));
            }
            KvType::F32 => {
                let keys = &mut bytemuck::cast_slice_mut::<u8, f32>(keys(0, layout.dim, 4))[lane..];
                keys.iter_mut().step_by(LANES).zip(key).for_each(|(to, value)| *to = *value);
                bytemuck::cast_slice_mut(values(0, layout.dim, 4)).copy_from_slice(value);
            }
            KvType::Q8 => {
                // Both are whole numbers of scales: lines of 16 positions.
                let scales_at = layout.len().unwrap_or(0);
                let codes = &mut bytemuck::cast_slice_mut::<u8, i8>(keys(0, layout.dim, 1))[lane..];
                let scales = &mut bytemuck::cast_slice_mut::<u8, f16>(keys(scales_at, layout.groups(), 2))[lane..];
                let groups = codes.chunks_mut(LANES * Q8_GROUP).zip(scales.iter_mut().step_by(LANES));
                for (key, (to, scale)) in key.chunks(Q8_GROUP).zip(groups) {
                    let mut rounded = [0; Q8_GROUP];
                    *scale = vector::round_q8(key, &mut rounded[..key.len()]);
                    to.iter_mut().step_by(LANES).zip(&rounded[..key.len()]).for_each(|(to, code)| *to = *code);
                }
                let codes = bytemuck::cast_slice_mut::<u8, i8>(values(0, layout.dim, 1));
                let scales = bytemuck::cast_slice_mut::<u8, f16>(values(scales_at, layout.groups(), 2));
                let groups = codes.chunks_mut(Q8_GROUP).zip(scales);
                for (value, (to, scale)) in value.chunks(Q8_GROUP).zip(groups) {
                    *scale = vector::round_q8(value, &mut to[..value.len()]);
                }
            }
        }
    }
}

/// What is done with the numbers of a position: the position, their first byte in the store, the bytes from one to the
/// next, the bytes of one, and the bytes that they are in a snapshot.
type Visit<'a> = dyn FnMut(usize, usize, usize, usize, Range<usize>) + 'a;

impl Layout {
    /// Visits the numbers of the first `positions` of keys or values of all heads, which are `bytes` in a snapshot.
    fn each(&self, positions: usize, bytes: usize, is_key: bool, visit: &mut Visit<'_>) {
        let head_bytes = bytes / self.kv_heads.max(1);
        let mut part = |start: usize, per_position: usize, size: usize, row: usize, skipped: usize| {
            for (head, position) in (0..self.kv_heads).flat_map(|head| (0..positions).map(move |p| (head, p))) {
                let (at, apart) = match is_key {
                    true => (self.key(head, position, per_position), LANES),
                    false => (self.value(head, position, per_position), 1),
                };
                let to = head * head_bytes + skipped + position * row;
                visit(position, start + at * size, apart * size, size, to..to + per_position * size);
            }
        };
        let size = match self.kv_type {
            KvType::F16 => 2,
            KvType::F32 => 4,
            KvType::Q8 => 1,
        };
        part(0, self.dim, size, self.dim * size, 0);
        if self.kv_type == KvType::Q8 {
            let row = self.kv_type.scale_bytes(self.dim as u32) as usize;
            part(self.len().unwrap_or(0), self.groups(), 2, row, positions * self.dim);
        }
    }
}

/// `len` half-precision numbers from number `at` on.
fn widen_f16<'a>(kernels: &dyn Kernels, bytes: &[u8], at: usize, len: usize, widened: &'a mut [f32]) -> &'a [f32] {
    let widened = &mut widened[..len];
    kernels.expand_f16(&bytes[2 * at..2 * (at + len)], widened);
    widened
}
