//! What one session holds on the device: KV cache, rotary tables, and the activations that its plan asks for.

use std::collections::HashMap;
use std::sync::Arc;

use awqua_shaders::cuda::{CHUNK, COOP_TOKENS, MANY_HEADS, Place, Row, SLOTS_OF_TILES, STAGE, expert_tiles};

use super::cache::{self, Part, Prefix};
use super::driver::{Buffer, Gpu, Stream};
use crate::backend::{BufferId, KvType, Op, Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};

const _: () = assert!(crate::backend::Q8_GROUP == awqua_shaders::cuda::KV_GROUP as usize);

/// Most rows of a step whose products read inputs in rows instead of tiles.
pub(super) const FEW: u32 = 16;

/// How half precision inputs of a matrix lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// Rows, for few tokens.
    Rows,
    /// Tiles, for many.
    Tiles,
    /// Tiles of what goes through the same one of so many experts, so many of which a token goes through.
    Slots { experts: u32, top_k: u32 },
}

impl Form {
    pub(super) fn is_tiled(self) -> bool {
        self != Self::Rows
    }
}

/// Where inputs of a matrix lie: half precision rows of `stride` elements, or tiles of `stride` chunks a row.
#[derive(Clone, Copy)]
pub(super) struct Staged {
    pub(super) address: u64,
    pub(super) stride: u32,
    pub(super) tiled: bool,
}

/// Addresses of the tiles of slots and of the slots that bring the rows of an expert together.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    pub(super) tiles: u64,
    pub(super) slots: u64,
}

/// Tiles and slots that a step of `most` tokens can need.
fn slots_of(experts: u32, top_k: u32, most: u32) -> (u64, u64) {
    let [few, many] = SLOTS_OF_TILES;
    let tiles = |of: u32, tokens: u32| u64::from(expert_tiles(of, experts, top_k, tokens));
    let (of_few, of_many) = (tiles(few, most.min(FEW)), tiles(many, most));
    (of_few.max(of_many), (of_few * u64::from(few)).max(of_many * u64::from(many)))
}

/// Room for the splits of attention over few tokens.
#[derive(Clone, Copy)]
pub(super) struct Splits {
    pub(super) number: u32,
    pub(super) partial: u64,
    pub(super) weights: u64,
    pub(super) arrived: u64,
}

/// Bytes of device memory that a session takes at most: which buffers are needed depends on the weights.
pub(super) fn runner_bytes(program: &Program, config: &RunnerConfig) -> u64 {
    let shape = program.attention;
    let kv = cache::bytes(program, config.kv_type.unwrap_or(KvType::F16), config.context);
    let most = u64::from(config.max_tokens);
    let buffers = program.buffers.iter().map(|desc| {
        let rows = u64::from(desc.rows(config));
        let few = u64::from(FEW) * u64::from(desc.per_token);
        let staged = u64::from(desc.width.next_multiple_of(STAGE)) * 2 * (rows.next_multiple_of(128) + few);
        (rows * u64::from(desc.width.next_multiple_of(4)) * 4).saturating_add(staged)
    });
    let buffers = buffers.fold(expert_bytes(program, config.max_tokens), u64::saturating_add);
    let queries = most * u64::from(shape.heads) * u64::from(shape.head_dim) * 2;
    // At most 64 splits of each token and head.
    let splits = u64::from(FEW) * u64::from(shape.heads) * 64 * (u64::from(shape.head_dim) * 4 + 8);
    let ropes = u64::from(program.rope_tables) * u64::from(config.context) * u64::from(shape.rotary_dim) * 4;
    let sampling = super::sampling::bytes(program.vocab_size, config.context);
    [kv, buffers, queries, splits, ropes, sampling, most * 32].into_iter().fold(0, u64::saturating_add)
}

/// Bytes of the slots of a mixture, and of the inputs of its experts in slots.
fn expert_bytes(program: &Program, most: u32) -> u64 {
    let mut inputs: HashMap<BufferId, u64> = HashMap::new();
    let mut own = 0;
    for op in &program.ops {
        let Op::Experts { x, count, routes, .. } = *op else { continue };
        let width = |id: BufferId| program.buffers.get(id.0 as usize).map_or(0, |desc| desc.width);
        let (tiles, slots) = slots_of(count, width(routes) / 2, most);
        own = own.max((tiles + slots) * 4);
        inputs.insert(x, slots.saturating_mul(u64::from(width(x).next_multiple_of(STAGE)) * 2));
    }
    inputs.into_values().fold(own, u64::saturating_add)
}

/// The buffers of one session.
pub(super) struct Memory {
    gpu: Arc<Gpu>,
    pub(super) config: RunnerConfig,
    pub(super) kv_type: KvType,
    /// Everything that was made, zeros at first.
    buffers: Vec<Buffer>,
    /// The cache behind the shared positions, see [`Part`].
    kv: usize,
    /// The first positions, if they are shared.
    pub(super) prefix: Option<Arc<Prefix>>,
    /// (max_tokens) u32.
    pub(super) tokens: usize,
    /// The step's [`Place`], or those of the members of a pass.
    pub(super) place: usize,
    /// Whether each token belongs to a session of its own.
    pub(super) separate: bool,
    /// (max_tokens) [`Row`].
    pub(super) rows: usize,
    /// Rotary tables: (tables, context, rotary_dim / 2, 2) f32.
    pub(super) ropes: usize,
    /// By program buffer: f32 rows.
    activations: HashMap<BufferId, usize>,
    /// By program buffer and form.
    staged: HashMap<(BufferId, Form), usize>,
    /// Tiles and slots, by the experts of a layer and of a token.
    slots: HashMap<(u32, u32), [usize; 2]>,
    queries: Option<usize>,
    splits: Option<Splits>,
}

impl Memory {
    /// Allocates what every session has, behind the positions of `prefix`; `separate` if tokens belong to sessions of
    /// their own.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] naming what did not fit, or a device error.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        stream: &Stream,
        program: &Program,
        config: &RunnerConfig,
        separate: bool,
        prefix: Option<Arc<Prefix>>,
    ) -> Result<Self> {
        let kv_type = config.kv_type.unwrap_or(KvType::F16);
        let shape = program.attention;
        let own = config.context.saturating_sub(prefix.as_ref().map_or(0, |prefix| prefix.len));
        let kv = cache::bytes(program, kv_type, own);
        let free = gpu.free_memory()?;
        if kv > free {
            let message = format!("a KV cache of {own} tokens needs {kv} bytes, {free} are free");
            return Err(Error::new(ErrorKind::OutOfMemory, message));
        }
        let mut memory = Self {
            gpu: gpu.clone(),
            config: config.clone(),
            kv_type,
            buffers: Vec::new(),
            kv: 0,
            prefix,
            tokens: 0,
            place: 0,
            separate,
            rows: 0,
            ropes: 0,
            activations: HashMap::new(),
            staged: HashMap::new(),
            slots: HashMap::new(),
            queries: None,
            splits: None,
        };
        let most = u64::from(config.max_tokens);
        memory.kv = memory.make(stream, "the KV cache", Some(kv))?;
        memory.tokens = memory.make(stream, "the tokens", most.checked_mul(4))?;
        let places = if separate { most } else { 1 };
        memory.place = memory.make(stream, "the place of a step", places.checked_mul(size_of::<Place>() as u64))?;
        memory.rows = memory.make(stream, "the places of tokens", most.checked_mul(size_of::<Row>() as u64))?;
        let rows = u64::from(config.context).checked_mul(u64::from(program.rope_tables));
        let rope_bytes = rows.and_then(|rows| rows.checked_mul(u64::from(shape.rotary_dim) * 4));
        memory.ropes = memory.make(stream, "the rotary tables", rope_bytes)?;
        stream.upload(memory.buffer(memory.place), 0, bytemuck::bytes_of(&memory.place_at(0)))?;
        Ok(memory)
    }

    /// What kernels have to know for a step at `position`.
    pub(super) fn place_at(&self, position: u32) -> Place {
        let shared = self.shared();
        Place {
            cache: self.address(self.kv),
            prefix: self.prefix.as_ref().map_or(0, |prefix| prefix.address()),
            rope: self.address(self.ropes),
            context: self.config.context,
            position,
            shared,
            own: self.config.context - shared,
        }
    }

    /// Positions that are shared.
    pub(super) fn shared(&self) -> u32 {
        self.prefix.as_ref().map_or(0, |prefix| prefix.len)
    }

    /// The positions behind them.
    pub(super) fn own(&self) -> Part<'_> {
        Part { buffer: self.buffer(self.kv), positions: self.shared()..self.config.context }
    }

    /// All positions.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        self.prefix.as_ref().map(|prefix| prefix.part()).into_iter().chain([self.own()])
    }

    fn make(&mut self, stream: &Stream, what: &str, bytes: Option<u64>) -> Result<usize> {
        let bytes =
            bytes.ok_or_else(|| Error::new(ErrorKind::OutOfMemory, format!("{what} needs more than 2^64 bytes")))?;
        let buffer = self.gpu.buffer(what, bytes)?;
        stream.clear(&buffer)?;
        self.buffers.push(buffer);
        Ok(self.buffers.len() - 1)
    }

    /// Bytes of them if the first `shared` positions were not among them, in whatever way they are kept now.
    pub(super) fn bytes_behind(&self, program: &Program, shared: u32) -> u64 {
        let own = self.config.context.saturating_sub(shared);
        self.bytes() - self.buffer(self.kv).bytes() + cache::bytes(program, self.kv_type, own)
    }

    /// A buffer by its number.
    pub(super) fn buffer(&self, number: usize) -> &Buffer {
        &self.buffers[number]
    }

    pub(super) fn address(&self, number: usize) -> u64 {
        self.buffers[number].address()
    }

    /// Bytes of all of them, without what is shared.
    pub(super) fn bytes(&self) -> u64 {
        self.buffers.iter().map(Buffer::bytes).sum()
    }

    /// The f32 rows of a program buffer and the elements of a row; makes them if they were not needed so far.
    pub(super) fn activation(&mut self, stream: &Stream, program: &Program, id: BufferId) -> Result<(u64, u32)> {
        let desc = program
            .buffers
            .get(id.0 as usize)
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("the program has no buffer {}", id.0)))?;
        let stride = desc.width.next_multiple_of(4);
        let number = match self.activations.get(&id) {
            Some(number) => *number,
            None => {
                let rows = desc.rows(&self.config);
                let what = format!("activation buffer `{}`", desc.name);
                let bytes = u64::from(rows).checked_mul(u64::from(stride) * 4);
                let number = self.make(stream, &what, bytes)?;
                self.activations.insert(id, number);
                number
            }
        };
        Ok((self.address(number), stride))
    }

    /// The f32 rows of a program buffer, if it has any.
    pub(super) fn existing(&self, id: BufferId) -> Option<&Buffer> {
        self.activations.get(&id).map(|number| &self.buffers[*number])
    }

    /// The half precision inputs that stand for a program buffer.
    pub(super) fn staged(&mut self, stream: &Stream, program: &Program, id: BufferId, form: Form) -> Result<Staged> {
        let desc = &program.buffers[id.0 as usize];
        let width = desc.width.next_multiple_of(STAGE);
        let number = match self.staged.get(&(id, form)) {
            Some(number) => *number,
            None => {
                let rows = match form {
                    Form::Rows => u64::from(FEW) * u64::from(desc.per_token),
                    Form::Tiles => u64::from(desc.rows(&self.config)).next_multiple_of(u64::from(COOP_TOKENS)),
                    Form::Slots { experts, top_k } => slots_of(experts, top_k, self.config.max_tokens).1,
                };
                let what = format!("inputs `{}`", desc.name);
                let number = self.make(stream, &what, rows.checked_mul(u64::from(width) * 2))?;
                self.staged.insert((id, form), number);
                number
            }
        };
        let tiled = form.is_tiled();
        let stride = if tiled { width / CHUNK } else { width };
        Ok(Staged { address: self.address(number), stride, tiled })
    }

    /// Room for bringing the rows of an expert together.
    pub(super) fn slots(&mut self, stream: &Stream, experts: u32, top_k: u32) -> Result<Slots> {
        let [tiles, slots] = match self.slots.get(&(experts, top_k)) {
            Some(numbers) => *numbers,
            None => {
                let (tiles, slots) = slots_of(experts, top_k, self.config.max_tokens);
                let tiles = self.make(stream, "tiles of rows by expert", tiles.checked_mul(4))?;
                let slots = self.make(stream, "rows by expert", slots.checked_mul(4))?;
                self.slots.insert((experts, top_k), [tiles, slots]);
                [tiles, slots]
            }
        };
        Ok(Slots { tiles: self.address(tiles), slots: self.address(slots) })
    }

    /// Half precision queries: (max_tokens, heads * head_dim).
    pub(super) fn queries(&mut self, stream: &Stream, program: &Program) -> Result<u64> {
        if let Some(queries) = self.queries {
            return Ok(self.address(queries));
        }
        let width = u64::from(program.attention.heads) * u64::from(program.attention.head_dim);
        let bytes = u64::from(self.config.max_tokens).checked_mul(width * 2);
        let number = self.make(stream, "queries", bytes)?;
        self.queries = Some(number);
        Ok(self.address(number))
    }

    /// Room for the splits of attention.
    pub(super) fn splits(&mut self, stream: &Stream, program: &Program) -> Result<Splits> {
        if let Some(splits) = self.splits {
            return Ok(splits);
        }
        let shape = program.attention;
        let blocks = shape.kv_heads * (shape.heads / shape.kv_heads).div_ceil(MANY_HEADS);
        // No more blocks than run at once, two a multiprocessor, and no split of less than a block of positions; of several
        // sessions, when half of them are there.
        let at_once = if self.separate { (self.config.max_tokens / 2).max(1) } else { 1 };
        let number = 2 * self.gpu.limits.multiprocessors / (blocks * at_once);
        let number = number.min(self.config.context.div_ceil(64)).clamp(1, 64);
        let parts = u64::from(FEW.min(self.config.max_tokens)) * u64::from(shape.heads) * u64::from(number);
        let partial = self.make(stream, "attention of the splits", parts.checked_mul(u64::from(shape.head_dim) * 4))?;
        let weights = self.make(stream, "sums of the splits", parts.checked_mul(8))?;
        let arrived = self.make(stream, "counts of the splits", Some(u64::from(FEW) * u64::from(blocks) * 4))?;
        let splits = Splits {
            number,
            partial: self.address(partial),
            weights: self.address(weights),
            arrived: self.address(arrived),
        };
        self.splits = Some(splits);
        Ok(splits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_take_what_the_kernels_expect() {
        for head_dim in 1..=512 {
            let kernels = u64::from(awqua_shaders::cuda::scale_bytes(head_dim));
            assert_eq!(KvType::Q8.scale_bytes(head_dim), kernels, "heads of {head_dim}");
        }
    }
}
