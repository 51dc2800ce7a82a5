//! Bytes from files and memory brought to where a device takes them from, on several threads where there are many.

use super::source::Extent;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use crate::error::Result;

/// A run of bytes that is wanted elsewhere.
#[derive(Debug, Clone, Copy)]
pub enum Piece<'a> {
    /// Bytes in memory, or of a mapped file.
    Bytes(&'a [u8]),
    /// Bytes of a file that is read when they are wanted.
    Stored {
        /// The file or a range of it.
        extent: &'a Extent,
        /// First byte of the piece in it.
        at: usize,
        /// Bytes of the piece.
        len: usize,
    },
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
impl Piece<'_> {
    /// Bytes of the piece.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Stored { len, .. } => *len,
        }
    }

    /// Fills `out` with the bytes from byte `from` of the piece on.
    fn copy(&self, from: usize, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Bytes(bytes) => out.copy_from_slice(&bytes[from..from + out.len()]),
            Self::Stored { extent, at, .. } => extent.read(at + from, out)?,
        }
        Ok(())
    }
}

/// Copies every piece to its place, which is as long. A few megabytes and more are copied on several threads: one alone
/// is slower than the bus of a device, most of all where files are mapped.
///
/// # Errors
/// The first of those of [`Extent::read`].
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) fn gather(pieces: Vec<(&mut [u8], Piece<'_>)>) -> Result<()> {
    /// Bytes of a turn of a thread.
    const TURN: usize = 512 << 10;
    /// Bytes for which another thread is worth its start.
    const SHARE: usize = 2 << 20;
    /// More do not get more out of the memory of a machine with one socket.
    const MOST: usize = 8;
    let total: usize = pieces.iter().map(|(place, _)| place.len()).sum();
    let processors = crate::processors::processors().min(MOST);
    let threads = (total / SHARE).clamp(1, processors);
    let turns = pieces
        .into_iter()
        .flat_map(|(place, piece)| place.chunks_mut(TURN).enumerate().map(move |(i, place)| (place, piece, i * TURN)));
    if threads == 1 {
        return turns.into_iter().try_for_each(|(place, piece, from)| piece.copy(from, place));
    }
    let turns = std::sync::Mutex::new(turns);
    let work = || {
        loop {
            let turn = turns.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
            let Some((place, piece, from)) = turn else { return Ok(()) };
            piece.copy(from, place)?;
        }
    };
    std::thread::scope(|scope| {
        let start = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).filter_map(start).collect();
        let own = work();
        others
            .into_iter()
            .fold(own, |all, other| all.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
    })
}

#[cfg(all(test, any(feature = "cuda", feature = "wgpu")))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::error::ErrorKind;
    use crate::tensor::Bytes;

    fn stored(bytes: &[u8]) -> Extent {
        let path: &std::path::Path = "weights".as_ref();
        Extent::whole(Arc::new(Bytes::owned(bytes.to_vec())), path.into())
    }

    #[test]
    fn pieces_of_every_size_come_to_their_places() {
        let bytes: Vec<u8> = (0..9_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let extent = stored(&bytes);
        let ranges = [0..0, 0..1, 5..700_000, 3..9_000_000, 8_999_999..9_000_000];
        for is_stored in [false, true] {
            let mut places: Vec<Vec<u8>> = ranges.iter().map(|range| vec![0; range.len()]).collect();
            let pieces = places.iter_mut().zip(&ranges).map(|(place, range)| {
                let piece = match is_stored {
                    true => Piece::Stored { extent: &extent, at: range.start, len: range.len() },
                    false => Piece::Bytes(&bytes[range.clone()]),
                };
                (place.as_mut_slice(), piece)
            });
            gather(pieces.collect()).expect("the bytes are there");
            assert!(places.iter().zip(ranges.clone()).all(|(place, range)| *place == bytes[range]));
        }
    }

    #[test]
    fn what_is_missing_is_an_error() {
        let extent = stored(&[1; 100]);
        let mut place = vec![0; 8 << 20];
        let len = place.len();
        let error = gather(vec![(&mut place, Piece::Stored { extent: &extent, at: 0, len })]).expect_err("too short");
        assert_eq!(error.kind(), ErrorKind::Io);
    }
}
