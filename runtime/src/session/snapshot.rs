//! A session's cache as bytes, and as the start of other sessions.

use super::{Rotations, Session, Todo, UnderWay};
use crate::backend::{KvType, Sharing, kv_bytes};
use crate::checksum::Checksum;
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"awquakv1";

/// What precedes tokens and cache: little-endian words.
struct Header {
    /// Of [`crate::Model::identity`].
    model: u64,
    /// Checksum of everything behind it.
    checksum: u64,
    kv_type: u32,
    n_tokens: u32,
    /// Leading tokens computed in chunks, and in whole chunks from the start; the size of a chunk.
    chunked: u32,
    grid: u32,
    chunk: u32,
    /// Length of the sequence that the rotations are for.
    length: u32,
}

/// Bytes of the magic and the header.
const HEADER: usize = 8 + 2 * 8 + 6 * 4;

impl Header {
    fn write(&self, out: &mut [u8]) {
        let words = [self.kv_type, self.n_tokens, self.chunked, self.grid, self.chunk, self.length];
        let bytes = MAGIC.iter().copied();
        let bytes = bytes.chain(self.model.to_le_bytes()).chain(self.checksum.to_le_bytes());
        let bytes = bytes.chain(words.into_iter().flat_map(u32::to_le_bytes));
        out.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.get(..HEADER)?.strip_prefix(MAGIC)?;
        let (longs, words) = rest.split_at(16);
        let long = |i: usize| longs.as_chunks().0.get(i).map(|b| u64::from_le_bytes(*b));
        let word = |i: usize| words.as_chunks().0.get(i).map(|b| u32::from_le_bytes(*b));
        Some(Self {
            model: long(0)?,
            checksum: long(1)?,
            kv_type: word(0)?,
            n_tokens: word(1)?,
            chunked: word(2)?,
            grid: word(3)?,
            chunk: word(4)?,
            length: word(5)?,
        })
    }
}

/// Of the header but for the checksum itself, and everything behind it.
fn checksum(snapshot: &[u8]) -> u64 {
    let mut sum = Checksum::default();
    sum.add(&snapshot[..16]);
    sum.add(&snapshot[24..]);
    sum.finish()
}

fn number(kv_type: KvType) -> u32 {
    match kv_type {
        KvType::F16 => 1,
        KvType::F32 => 2,
        KvType::Q8 => 3,
    }
}

impl Session {
    /// Bytes that [`Self::save`] needs now.
    pub fn snapshot_bytes(&self) -> u64 {
        let n = self.tokens.len() as u32;
        HEADER as u64 + 4 * u64::from(n) + kv_bytes(self.model.program(), self.kv_type(), n)
    }

    /// Writes the tokens of the cache with their keys and values to `out`, which is [`Self::snapshot_bytes`] long. Waits
    /// for the device.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for another length or while an answer is being made, [`ErrorKind::DeviceLost`] or
    /// [`ErrorKind::Evicted`] if the cache is not there, or a device error.
    pub fn save(&mut self, out: &mut [u8]) -> Result<()> {
        self.require_idle()?;
        let bytes = self.snapshot_bytes();
        if out.len() as u64 != bytes {
            let message = format!("a snapshot of this session has {bytes} bytes, got {}", out.len());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let n = self.tokens.len() as u32;
        let header = Header {
            model: self.model.identity(),
            checksum: 0,
            kv_type: number(self.kv_type()),
            n_tokens: n,
            chunked: self.chunked as u32,
            grid: self.grid as u32,
            chunk: self.config.max_tokens,
            length: self.rotations.length as u32,
        };
        header.write(out);
        let (tokens, kv) = out[HEADER..].split_at_mut(4 * n as usize);
        for (to, id) in tokens.as_chunks_mut().0.iter_mut().zip(&self.tokens) {
            *to = id.to_le_bytes();
        }
        if n > 0 {
            self.runner()?.save_kv(n, kv)?;
        }
        let checksum = checksum(out);
        Header { checksum, ..header }.write(out);
        Ok(())
    }

    /// Takes back what [`Self::save`] gave, here or in another session, or another run, on the same model. Where this
    /// session stores its cache in another type, the tokens are taken and computed again when they are needed.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for bytes that are no snapshot, damaged or of another model, and while an answer is
    /// being made; [`ErrorKind::ContextFull`] if the tokens do not fit. The session stays as it was then.
    pub fn restore(&mut self, snapshot: &[u8]) -> Result<()> {
        self.require_idle()?;
        let invalid = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let header = Header::read(snapshot).ok_or_else(|| invalid("the bytes are not of a snapshot".into()))?;
        if header.model != self.model.identity() {
            return Err(invalid("the snapshot was made with another model".into()));
        }
        if header.checksum != checksum(snapshot) {
            return Err(invalid("the snapshot is damaged: its checksum does not fit".into()));
        }
        let n = header.n_tokens;
        let kv_type = match header.kv_type {
            1 => KvType::F16,
            2 => KvType::F32,
            3 => KvType::Q8,
            other => return Err(invalid(format!("the snapshot has an unknown KV type {other}"))),
        };
        let expected = HEADER as u64 + 4 * u64::from(n) + kv_bytes(self.model.program(), kv_type, n);
        if snapshot.len() as u64 != expected {
            return Err(invalid(format!("a snapshot of {n} tokens has {expected} bytes, got {}", snapshot.len())));
        }
        let (tokens, kv) = snapshot[HEADER..].split_at(4 * n as usize);
        let tokens: Vec<u32> = tokens.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        if n > 0 {
            self.check_ids(&tokens, 0)?;
        }
        self.reset();
        self.chunked = header.chunked.min(n) as usize;
        let same_chunks = header.chunk == self.config.max_tokens;
        match &mut self.place {
            Some(place) if place.runner.kv_type() == kv_type && !place.backend.is_lost() => {
                if n > 0 {
                    place.own(&self.model, 0)?;
                    place.runner.load_kv(n, kv)?;
                }
                self.tokens.extend_from_slice(&tokens);
                self.grid = if same_chunks { header.grid.min(n) as usize } else { 0 };
                self.rotations = Rotations::of_length(header.length as usize);
            }
            _ => {
                self.todo.clear();
                self.todo.ids = tokens;
                self.todo.single_from = self.chunked;
            }
        }
        Ok(())
    }

    /// A session of the same capacities that holds what this one does, without computing it again: many characters on
    /// one system prompt compute it once, and keep its memory once: on the CPU what nobody writes to, on a GPU the part
    /// that all forks of one session begin with, in multiples of 64 tokens or more, beside the session they came from.
    /// Through wgpu, deterministic sessions copy it where shared memory would change the last bits: with matrix units or
    /// subgroups unless the session has [`SessionOptions::share_forks`](super::SessionOptions), and in models with
    /// windows. Does not wait.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] while an answer is being made, [`ErrorKind::OutOfMemory`], [`ErrorKind::DeviceLost`] or
    /// [`ErrorKind::Evicted`] if the cache is not there.
    pub fn fork(&mut self) -> Result<Self> {
        self.require_idle()?;
        let n = self.tokens.len() as u32;
        let place = self.place.as_mut().ok_or_else(super::tick::no_runner)?;
        let sharing = if self.deterministic { Sharing::Exact } else { Sharing::Always };
        let fork = place.fork(&self.model, n, sharing)?;
        let mut tokens = Vec::with_capacity(self.config.context as usize);
        tokens.extend_from_slice(&self.tokens);
        Ok(Self {
            model: self.model.clone(),
            config: self.config.clone(),
            deterministic: self.deterministic,
            place: Some(fork),
            is_lost: false,
            tokens,
            has_logits: false,
            chunked: self.chunked,
            grid: self.grid,
            rotations: self.rotations.clone(),
            todo: Todo::default(),
            under_way: UnderWay::default(),
            answer: None,
            finished: None,
            embedding: None,
            embedded: Vec::new(),
            events: Default::default(),
            trims_seen: self.trims_seen,
            logits: Vec::new(),
        })
    }
}
