//! The directory of a zip archive: just enough to find members that are stored as they are.
//!
//! After PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3. The crate `zip` decompresses; here only positions count, and
//! the file may be one that a host reads for us.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

use super::super::source::Extent;
use super::invalid;

/// End of the central directory without its comment, and the longest comment.
const END: usize = 22;
const MAX_COMMENT: usize = 0xffff;
/// Largest central directory, bytes.
const MAX_DIRECTORY: usize = 64 << 20;
/// A field of 32 bits that says: see the extra field of 64 bits.
const WIDE: usize = 0xffff_ffff;

/// Byte ranges of every member by name.
///
/// # Errors
/// [`ErrorKind::InvalidFile`], [`ErrorKind::Unsupported`] for compressed or encrypted members, [`ErrorKind::Io`].
pub(super) fn members(file: &Extent) -> Result<BTreeMap<String, Range<usize>>> {
    let (start, length, count) = directory(file)?;
    if length > MAX_DIRECTORY {
        return Err(invalid(format!("a directory of {length} bytes, at most {MAX_DIRECTORY} are accepted")));
    }
    let directory = start.checked_add(length).and_then(|end| file.slice(start..end));
    let directory = directory.ok_or_else(|| invalid("its directory leaves the file: truncated?"))?.copy()?;

    let mut members = BTreeMap::new();
    let mut rest = &directory[..];
    for _ in 0..count {
        let header = rest.get(..46).filter(|header| header.starts_with(b"PK\x01\x02"));
        let header = header.ok_or_else(|| invalid("its directory ends early"))?;
        let (name, extra, comment) = (u16_at(header, 28), u16_at(header, 30), u16_at(header, 32));
        let entry = rest.get(..46 + name + extra + comment).ok_or_else(|| invalid("its directory ends early"))?;
        rest = &rest[entry.len()..];
        let Ok(name) = std::str::from_utf8(&entry[46..46 + name]) else {
            return Err(invalid("the name of a member is not UTF-8"));
        };
        let extra = &entry[entry.len() - extra - comment..entry.len() - comment];
        let (stored, size, offset) = sizes(header, extra).ok_or_else(|| invalid(format!("sizes of {name:?}")))?;
        if u16_at(header, 10) != 0 || u16_at(header, 8) & 1 != 0 || stored != size {
            let message = format!("member {name:?} is compressed or encrypted; `torch.save` stores as is");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let mut local = [0; 30];
        let outside = || invalid(format!("member {name:?} leaves the file: truncated?"));
        let place = offset.checked_add(local.len()).filter(|&end| end <= file.len()).ok_or_else(outside)?;
        file.read(offset, &mut local)?;
        if !local.starts_with(b"PK\x03\x04") {
            return Err(invalid(format!("member {name:?} is not where the directory says")));
        }
        // The extra field here differs from the one in the directory: writers align data with it.
        let start = place.checked_add(u16_at(&local, 26) + u16_at(&local, 28)).ok_or_else(outside)?;
        let end = start.checked_add(size).filter(|&end| end <= file.len()).ok_or_else(outside)?;
        if members.insert(name.to_owned(), start..end).is_some() {
            return Err(invalid(format!("two members are called {name:?}")));
        }
    }
    Ok(members)
}

/// Position, bytes and members of the central directory.
fn directory(file: &Extent) -> Result<(usize, usize, usize)> {
    let tail_start = file.len().saturating_sub(END + MAX_COMMENT);
    let tail = file.slice(tail_start..file.len()).ok_or_else(|| invalid("an empty file"))?.copy()?;
    let at = (0..tail.len().saturating_sub(END - 1))
        .rev()
        .find(|&at| tail[at..].starts_with(b"PK\x05\x06") && at + END + u16_at(&tail, at + 20) == tail.len());
    let at = at.ok_or_else(|| invalid("the archive has no end: truncated?"))?;
    let end = &tail[at..];
    let (count, length, start) = (u16_at(end, 10), u32_at(end, 12), u32_at(end, 16));
    let locator = at.checked_sub(20).map(|at| &tail[at..]).filter(|locator| locator.starts_with(b"PK\x06\x07"));
    let Some(locator) = locator else { return Ok((start, length, count)) };
    let place = u64_at(locator, 8).filter(|place| place.checked_add(56).is_some_and(|end| end <= file.len()));
    let place = place.ok_or_else(|| invalid("its directory leaves the file: truncated?"))?;
    let mut wide = [0; 56];
    file.read(place, &mut wide)?;
    let sizes = (u64_at(&wide, 48), u64_at(&wide, 40), u64_at(&wide, 32));
    match sizes {
        (Some(start), Some(length), Some(count)) if wide.starts_with(b"PK\x06\x06") => Ok((start, length, count)),
        _ => Err(invalid("the end of its directory is damaged")),
    }
}

/// Stored bytes, bytes and position of a member.
fn sizes(header: &[u8], mut extra: &[u8]) -> Option<(usize, usize, usize)> {
    let narrow = [u32_at(header, 24), u32_at(header, 20), u32_at(header, 42)];
    let mut wide: &[u8] = &[];
    while let [a, b, c, d, rest @ ..] = extra {
        let (id, length) = (u16::from_le_bytes([*a, *b]), usize::from(u16::from_le_bytes([*c, *d])));
        let field = rest.get(..length)?;
        if id == 1 {
            wide = field;
        }
        extra = &rest[length..];
    }
    let mut sizes = [0; 3];
    for (size, narrow) in sizes.iter_mut().zip(narrow) {
        *size = narrow;
        if narrow == WIDE {
            *size = u64_at(wide.get(..8)?, 0)?;
            wide = &wide[8..];
        }
    }
    let [size, stored, offset] = sizes;
    Some((stored, size, offset))
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u16_at(bytes, at) | u16_at(bytes, at + 2) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?)).ok()
}
