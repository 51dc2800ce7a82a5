//! Copies of a session's KV cache: for forks, and in the order that sessions are saved in.

use std::ops::Range;

use awqua_shaders as shaders;

use super::WgpuRunner;
use crate::backend::KvType;
use crate::backend::wgpu::memory::Prefix;
use crate::error::Result;

/// Positions of a layer's keys or values that lie in one piece.
struct Piece {
    layer: u32,
    values: bool,
    /// All heads, or one where its positions lie together.
    heads: Range<u32>,
    /// The scales instead of the elements.
    scales: bool,
    positions: Range<u32>,
}

/// Takes the keys or the values of a layer from the order of the cache, (n, heads) rows of `row` bytes, to that of what is
/// saved, (heads, n), or back with `n` and `heads` exchanged.
fn turn(rows: &[u8], n: usize, heads: usize, row: usize, out: &mut [u8]) {
    for (i, from) in rows.chunks_exact(row).enumerate() {
        let at = (i % heads * n + i / heads) * row;
        out[at..at + row].copy_from_slice(from);
    }
}

impl WgpuRunner {
    /// Whether the positions of a head lie together, instead of the heads of a position, see `kv_row` of the shaders.
    fn has_heads_apart(&self) -> bool {
        self.memory.kv_type == KvType::Q8
    }

    /// `positions` of keys and values of all layers, in pieces that lie in one buffer, in order.
    fn pieces(&self, positions: Range<u32>) -> impl Iterator<Item = Piece> + use<> {
        let Range { start, end } = positions;
        let edge = self.memory.shared().clamp(start, end.max(start));
        let heads = self.program.attention.kv_heads;
        let step = if self.has_heads_apart() { 1 } else { heads.max(1) };
        let parts: &[bool] = if self.memory.kv_type == KvType::Q8 { &[false, true] } else { &[false] };
        (0..self.program.layers).flat_map(move |layer| {
            [false, true].into_iter().flat_map(move |values| {
                (0..heads).step_by(step as usize).flat_map(move |head| {
                    parts.iter().flat_map(move |&scales| {
                        [start..edge, edge..end]
                            .into_iter()
                            .filter(|positions| !positions.is_empty())
                            .map(move |positions| Piece { layer, values, heads: head..head + step, scales, positions })
                    })
                })
            })
        })
    }

    /// First byte and bytes of a piece in a buffer of `positions` positions, of which the first is `first`: elements of all
    /// heads, then scales of all heads.
    fn bytes_of(&self, piece: &Piece, first: u32, positions: u32) -> (u64, u64) {
        let (shape, kv_type) = (self.program.attention, self.memory.kv_type);
        let (codes, scales) = (kv_type.code_bytes(shape.head_dim), kv_type.scale_bytes(shape.head_dim));
        let all = u64::from(shape.kv_heads) * u64::from(positions) * codes;
        let (start, row) = if piece.scales { (all, scales) } else { (0, codes) };
        let heads = u64::from(piece.heads.end - piece.heads.start);
        let before =
            u64::from(piece.heads.start) * u64::from(positions) + u64::from(piece.positions.start - first) * heads;
        (start + before * row, piece.positions.len() as u64 * heads * row)
    }

    /// Where a piece of the cache lies: buffer, byte and bytes.
    fn locate(&self, piece: &Piece) -> Result<(&wgpu::Buffer, u64, u64)> {
        let shared = self.memory.shared();
        let ((keys, values), first, positions) = match piece.positions.start < shared {
            true => (self.memory.shared_cache(piece.layer)?, 0, shared),
            false => (self.memory.cache(piece.layer)?, shared, self.config.context - shared),
        };
        let (offset, bytes) = self.bytes_of(piece, first, positions);
        Ok((if piece.values { values } else { keys }, offset, bytes))
    }

    /// Takes the rows of scales in `bytes`, all of a piece, from one order to another.
    fn reorder(&self, bytes: &mut [u8], order: fn(&[u16], &mut [u16])) {
        let row_bytes = self.memory.kv_type.scale_bytes(self.program.attention.head_dim) as usize;
        let (mut before, mut after) = (vec![0; row_bytes / 2], vec![0; row_bytes / 2]);
        for row in bytes.chunks_exact_mut(row_bytes) {
            let scales = row.as_chunks_mut::<2>().0;
            before.iter_mut().zip(&*scales).for_each(|(to, scale)| *to = u16::from_le_bytes(*scale));
            order(&before, &mut after);
            scales.iter_mut().zip(&after).for_each(|(to, scale)| *to = scale.to_le_bytes());
        }
    }

    /// Heads and bytes of a row of a cache whose heads lie together.
    fn rows_together(&self) -> Option<(usize, usize)> {
        let shape = self.program.attention;
        let row = self.memory.kv_type.row_bytes(shape.head_dim) as usize;
        (!self.has_heads_apart() && shape.kv_heads > 0 && row > 0).then_some((shape.kv_heads as usize, row))
    }

    /// As [`crate::backend::Runner::save_kv`].
    pub(super) fn save_positions(&mut self, n: u32, out: &mut [u8]) -> Result<()> {
        let gpu = &self.backend.gpu;
        let pieces: Vec<_> = self.pieces(0..n).collect();
        let mut left = &mut *out;
        let capacity = self.readback.capacity();
        let mut at = (0, 0);
        while at.0 < pieces.len() {
            let (mut sources, mut total) = (Vec::new(), 0);
            while let Some(piece) = pieces.get(at.0).filter(|_| total < capacity) {
                let (buffer, offset, bytes) = self.locate(piece)?;
                let part = (bytes - at.1).min(capacity - total);
                sources.push((buffer, offset + at.1, part));
                total += part;
                at = if at.1 + part == bytes { (at.0 + 1, 0) } else { (at.0, at.1 + part) };
            }
            let encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("KV") });
            self.readback.begin(gpu, encoder, &sources)?;
            self.readback.wait(gpu)?;
            let (now, rest) = left.split_at_mut(total as usize);
            self.readback.poll(gpu, |bytes| now.copy_from_slice(bytes))?;
            left = rest;
        }
        if let Some((heads, row)) = self.rows_together().filter(|_| n > 0) {
            let mut cached = vec![0; n as usize * heads * row];
            for block in out.chunks_exact_mut(cached.len()) {
                cached.copy_from_slice(block);
                turn(&cached, n as usize, heads, row, block);
            }
            return Ok(());
        }
        let mut left = out;
        for piece in pieces {
            let (now, rest) = left.split_at_mut(self.locate(&piece)?.2 as usize);
            if piece.scales {
                self.reorder(now, shaders::kv::scales_by_group);
            }
            left = rest;
        }
        Ok(())
    }

    /// As [`crate::backend::Runner::load_kv`].
    pub(super) fn load_positions(&mut self, n: u32, bytes: &[u8]) -> Result<()> {
        let turned = self.rows_together().filter(|_| n > 0);
        let (mut block, mut rest) = (Vec::new(), bytes);
        let mut in_block = 0;
        for piece in self.pieces(0..n) {
            let (buffer, offset, len) = self.locate(&piece)?;
            if let Some((heads, row)) = turned {
                // A block has a piece in front of the edge of what is shared, and one behind it.
                if in_block == block.len() {
                    block.resize(n as usize * heads * row, 0);
                    let (now, later) = rest.split_at(block.len());
                    turn(now, heads, n as usize, row, &mut block);
                    (rest, in_block) = (later, 0);
                }
                self.backend.gpu.write(buffer, offset, &block[in_block..in_block + len as usize])?;
                in_block += len as usize;
                continue;
            }
            let (now, later) = rest.split_at(len as usize);
            if piece.scales {
                let mut now = now.to_vec();
                self.reorder(&mut now, shaders::kv::scales_by_word);
                self.backend.gpu.write(buffer, offset, &now)?;
            } else {
                self.backend.gpu.write(buffer, offset, now)?;
            }
            rest = later;
        }
        Ok(())
    }

    /// A copy of the first `len` positions.
    pub(super) fn copy_prefix(&self, len: u32) -> Result<Prefix> {
        let gpu = &self.backend.gpu;
        let prefix = Prefix::new(gpu, &self.program, self.memory.kv_type, len)?;
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("prefix") });
        for piece in self.pieces(0..len) {
            let (from, offset, bytes) = self.locate(&piece)?;
            let (keys, values) = prefix.cache(piece.layer)?;
            let to = if piece.values { values } else { keys };
            encoder.copy_buffer_to_buffer(from, offset, to, self.bytes_of(&piece, 0, len).0, bytes);
        }
        gpu.submit(Some(encoder.finish()));
        Ok(prefix)
    }

    /// Copies `positions` to a session of the same program and context.
    pub(super) fn copy_positions(
        &self,
        positions: Range<u32>,
        to: &Self,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<()> {
        for piece in self.pieces(positions) {
            let ((from, from_offset, bytes), (to, to_offset, _)) = (self.locate(&piece)?, to.locate(&piece)?);
            encoder.copy_buffer_to_buffer(from, from_offset, to, to_offset, bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::turn;

    #[test]
    fn turning_twice_changes_nothing() {
        // Three positions of two heads, rows of two bytes.
        let cached = [0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15];
        let (mut saved, mut back) = ([0; 12], [0; 12]);
        turn(&cached, 3, 2, 2, &mut saved);
        assert_eq!(saved, [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]);
        turn(&saved, 2, 3, 2, &mut back);
        assert_eq!(back, cached);
    }
}
