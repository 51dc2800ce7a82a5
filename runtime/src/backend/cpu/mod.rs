//! CPU backend: packed matrices are laid out for its products as they come, other weights stay where they are mapped; a
//! step is computed in pieces that a deadline can part.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Backend, BackendInfo, Device, Group, KvType, Op, Program, Runner, RunnerConfig, WeightId};
use crate::error::{Error, ErrorKind, Result};
use crate::quant::awq::StoredGemm;
use crate::tensor::{Offset, Weight, WeightShape};
use integer::rows::Shape;
use kernels::Kernels;
use rounding::Rounding;
use runner::{CpuGroup, CpuRunner};
use weights::{Partial, Weights};

pub use cores::performance_cores;

#[cfg(target_arch = "aarch64")]
mod arm;
mod attention;
mod cores;
mod integer;
mod kernels;
mod matmul;
pub mod measure;
mod pool;
mod rounding;
mod runner;
mod share;
mod vector;
mod weights;
#[cfg(target_arch = "x86_64")]
mod x86;

/// An empty CPU backend.
pub fn open() -> Box<dyn Backend> {
    Processor::default().backend()
}

/// The processor as a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Processor {
    /// Compute without wide instructions, so that every processor of this family gets the same bits.
    pub portable: bool,
}

impl Device for Processor {
    fn backend(&self) -> Box<dyn Backend> {
        let kernels =
            if self.portable { Box::new(kernels::Portable) as Box<dyn kernels::Kernels> } else { kernels::best() };
        Box::new(Cpu {
            weights: Mutex::new(Some(Arc::default())),
            filling: None,
            weight_bytes: 0,
            rounding: Mutex::new(None),
            kernels: kernels.into(),
        })
    }
}

/// Bytes of host memory that a session takes.
pub(crate) fn runner_bytes(program: &Program, config: &RunnerConfig) -> u64 {
    let activations =
        program.buffers.iter().map(|desc| u64::from(desc.rows(config)).saturating_mul(u64::from(desc.width)));
    let ropes = u64::from(program.rope_tables) * u64::from(config.context) * u64::from(program.attention.rotary_dim);
    let (weights, sums) = scratch(program, config);
    let threads = config.jobs.as_ref().map_or(config.threads.unwrap_or(1), |jobs| jobs.0.threads()).max(1);
    // The row that sampling changes, and its candidates of two words each.
    let sampling = 3 * u64::from(program.vocab_size);
    let floats = activations.fold(ropes + sampling + gathered_len(program, config), u64::saturating_add);
    let floats = floats.saturating_add((weights as u64).saturating_add(sums as u64).saturating_mul(threads as u64));
    let floats = floats.saturating_add(partials_len(program, config).map_or(u64::MAX, |len| len as u64));
    let kv = super::kv_bytes(program, config.kv_type.unwrap_or(KvType::F32), config.context);
    floats.saturating_mul(4).saturating_add(kv).saturating_add(integer::bytes(program, config))
}

/// Bytes of an output layer in 8 bits, if one is made beside these weights.
pub(crate) fn rounded_bytes(program: &Program, weights: &[WeightShape]) -> u64 {
    if !weights.iter().any(|shape| Shape::of(shape).is_some()) {
        return 0;
    }
    let shapes = heads(program).filter_map(|weight| weights.get(weight.0 as usize));
    let large = shapes.filter(|shape| shape.bytes(shape.rows()) >= weights::LARGE as u64);
    let rounded = large.filter_map(|shape| match *shape {
        WeightShape::Dense { n, k, .. } => Shape::of_bytes(n, k)?.bytes(),
        _ => None,
    });
    rounded.map(|bytes| bytes as u64).sum()
}

/// The matrices whose products are logits.
fn heads(program: &Program) -> impl Iterator<Item = WeightId> + '_ {
    program.ops.iter().filter_map(|op| match *op {
        Op::Linear { weight, out, .. } if out.buffer == program.logits => Some(weight),
        _ => None,
    })
}

/// Elements of [`Gathered::x`].
fn gathered_len(program: &Program, config: &RunnerConfig) -> u64 {
    let inputs = program.ops.iter().filter_map(|op| match op {
        Op::Experts { x, out, .. } => {
            Some((program.buffers.get(x.0 as usize)?, program.buffers.get(out.buffer.0 as usize)?))
        }
        _ => None,
    });
    inputs.map(|(x, out)| u64::from(out.rows(config)).saturating_mul(u64::from(x.width))).max().unwrap_or(0)
}

/// Elements of the results of attention's splits.
fn partials_len(program: &Program, config: &RunnerConfig) -> Option<usize> {
    attention::partials_len(&program.attention, config.context as usize, config.max_tokens as usize)
}

/// Elements of the two parts of [`Scratch`].
fn scratch(program: &Program, config: &RunnerConfig) -> (usize, usize) {
    let shape = &program.attention;
    let norms = program.ops.iter().map(|op| if let Op::Norm { dim, .. } = op { *dim as usize } else { 0 });
    (
        matmul::scratch_weights().max(attention::scratch_rows(shape)).max(norms.max().unwrap_or(0)),
        matmul::scratch_sums(config.max_tokens as usize).max(attention::scratch_scores(
            shape,
            config.context as usize,
            config.max_tokens as usize,
        )),
    )
}

/// Scratch memory of one worker, allocated once.
struct Scratch {
    /// Expanded weight rows, expanded keys and values, or columns that a norm works on.
    weights: Vec<f32>,
    /// Partial sums of a block of weight rows, or attention scores.
    sums: Vec<f32>,
}

struct Cpu {
    /// Those reserved and not filled have no rows yet; `None` once they were evicted.
    weights: Mutex<Option<Arc<Weights>>>,
    /// The weight whose rows are coming, and the shape it will have.
    filling: Option<(usize, WeightShape, Partial)>,
    weight_bytes: u64,
    /// The output layer, while it is being rounded.
    rounding: Mutex<Option<Rounding>>,
    kernels: Arc<dyn Kernels>,
}

impl Cpu {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Weights>>> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights, which stay in memory as long as somebody holds them.
    fn weights(&self) -> Result<Arc<Weights>> {
        self.lock().clone().ok_or_else(|| Error::new(ErrorKind::Evicted, "the weights were evicted"))
    }

    /// The weight under way, its shape and its rows so far, and the weights, which nobody else has while they are loaded.
    fn filling(&mut self, id: WeightId) -> Result<(&WeightShape, &mut Partial, &mut Weights)> {
        let at = id.0 as usize;
        let Some((_, shape, partial)) = self.filling.as_mut().filter(|(filling, ..)| *filling == at) else {
            return Err(Error::new(ErrorKind::InvalidInput, format!("weight {at} takes no rows")));
        };
        Ok((shape, partial, loading(&mut self.weights)?))
    }

    /// Keeps the weight under way once all of its rows are there.
    fn end_of_rows(&mut self) -> Result<()> {
        match self.filling.take() {
            Some((at, shape, partial)) if partial.rows() == shape.rows() => {
                loading(&mut self.weights)?.set(at, partial, &shape)
            }
            filling => {
                self.filling = filling;
                Ok(())
            }
        }
    }
}

/// The weights while they are loaded and nobody else has them.
fn loading(weights: &mut Mutex<Option<Arc<Weights>>>) -> Result<&mut Weights> {
    let weights = weights.get_mut().unwrap_or_else(PoisonError::into_inner);
    weights.as_mut().and_then(Arc::get_mut).ok_or_else(|| Error::new(ErrorKind::Evicted, "the weights were evicted"))
}

impl Backend for Cpu {
    fn info(&self) -> BackendInfo {
        let threads = crate::processors::processors();
        BackendInfo {
            backend: "cpu",
            device: format!("{} ({threads} threads available)", std::env::consts::ARCH),
            variant: format!("{} (best instruction set this processor reports)", self.kernels.name()),
            default_kv: KvType::F32,
            weight_bytes: self.weight_bytes,
        }
    }

    fn reserve(&mut self, name: &str, shape: &WeightShape) -> Result<WeightId> {
        let weights = loading(&mut self.weights)?;
        let id = u32::try_from(weights.reserve())
            .map_err(|_| Error::new(ErrorKind::Unsupported, "more than 2^32 weights").in_tensor(name))?;
        self.weight_bytes += self.weight_bytes(shape);
        self.filling = Some((id as usize, *shape, Partial::Nothing));
        Ok(WeightId(id))
    }

    fn fill(&mut self, id: WeightId, rows: Weight) -> Result<()> {
        let (shape, partial, weights) = self.filling(id)?;
        weights.push(shape, partial, rows)?;
        self.end_of_rows()
    }

    fn takes_stored(&self, id: WeightId, stored: &StoredGemm) -> bool {
        let Some((_, shape, partial)) = self.filling.as_ref().filter(|(filling, ..)| *filling == id.0 as usize) else {
            return false;
        };
        let alike =
            WeightShape::W4 { n: shape.rows(), k: stored.k, group_size: stored.group_size, offset: Offset::Zero };
        *shape == alike && Shape::of(shape).is_some() && partial.rows().is_multiple_of(8)
    }

    fn fill_stored(&mut self, id: WeightId, stored: &StoredGemm, inputs: Range<usize>) -> Result<()> {
        let (shape, partial, weights) = self.filling(id)?;
        weights.push_stored(shape, partial, stored, inputs)?;
        self.end_of_rows()
    }

    /// There is nothing to compile; what is prepared is the output layer, in parts.
    fn prepare(&self, program: &Program, _: &RunnerConfig, most: u32) -> Result<u32> {
        let weights = self.weights()?;
        let mut rounding = self.rounding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut most = most as usize;
        let mut left = 0;
        for id in heads(program).map(|weight| weight.0 as usize) {
            let Some(shape) = weights.rounded_shape(id).filter(|_| weights.rounded(id).is_none()) else { continue };
            let mut now = match rounding.take_if(|begun| begun.id() == id) {
                Some(begun) => begun,
                None => Rounding::new(id, shape)?,
            };
            let before = now.left();
            now.advance(&weights, &*self.kernels, most);
            most -= before - now.left();
            match now.left() {
                0 => weights.keep_rounded(id, now.finish()),
                parts => {
                    *rounding = Some(now);
                    left += parts;
                    break;
                }
            }
        }
        Ok(u32::try_from(left).unwrap_or(u32::MAX))
    }

    fn weight_bytes(&self, shape: &WeightShape) -> u64 {
        shape.bytes(shape.rows())
    }

    fn is_host(&self) -> bool {
        true
    }

    fn runner_bytes(&self, program: &Program, config: &RunnerConfig) -> u64 {
        runner_bytes(program, config)
    }

    fn evict(&self) {
        *self.lock() = None;
    }

    fn runner(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Box<dyn Runner>> {
        Ok(Box::new(CpuRunner::new(self, Arc::clone(program), config)?))
    }

    fn group(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Option<Box<dyn Group>>> {
        Ok(Some(Box::new(CpuGroup::new(self, program, config)?)))
    }
}

/// Zeros in pages of their own, which take memory once they are written. An allocator may hand out memory that it had
/// before, and clears it at once.
#[derive(Default)]
struct Zeros<T> {
    pages: Option<memmap2::MmapMut>,
    of: std::marker::PhantomData<T>,
}

impl<T: bytemuck::Pod> Zeros<T> {
    /// `n` zeros, or an error that names the need.
    fn new(n: Option<usize>, what: &str) -> Result<Self> {
        let pages = match n.and_then(|n| n.checked_mul(size_of::<T>())) {
            Some(0) => None,
            bytes => Some(zero_pages(bytes, what)?),
        };
        Ok(Self { pages, of: std::marker::PhantomData })
    }
}

impl<T: bytemuck::Pod> std::ops::Deref for Zeros<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.pages.as_ref().map_or(&[], |pages| bytemuck::cast_slice(pages))
    }
}

impl<T: bytemuck::Pod> std::ops::DerefMut for Zeros<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.pages.as_mut().map_or(&mut [], |pages| bytemuck::cast_slice_mut(pages))
    }
}

/// `n` zeros, or an error that names the need.
fn zeros(n: Option<usize>, what: &str) -> Result<Vec<f32>> {
    let bytes = fitting(n.and_then(|n| n.checked_mul(size_of::<f32>())), what)?;
    let n = bytes / size_of::<f32>();
    // `vec!` leaves fresh pages untouched but aborts where there are none; so ask first.
    Vec::<f32>::new().try_reserve_exact(n).map_err(|_| out_of_memory(what, bytes))?;
    Ok(vec![0.0; n])
}

/// `bytes` zero bytes of untouched pages, or an error that names the need.
fn zero_pages(bytes: Option<usize>, what: &str) -> Result<memmap2::MmapMut> {
    let bytes = fitting(bytes, what)?;
    memmap2::MmapMut::map_anon(bytes).map_err(|_| out_of_memory(what, bytes))
}

/// Passes on a byte count that this machine could provide. Linux hands out address space beyond the memory it has,
/// so a failed allocation is not enough to find out; but to ask takes longer than to make a small one.
fn fitting(bytes: Option<usize>, what: &str) -> Result<usize> {
    const SMALL: usize = 1 << 20;
    match bytes {
        Some(bytes) if bytes < SMALL || available_memory().is_none_or(|available| bytes as u64 <= available) => {
            Ok(bytes)
        }
        Some(bytes) => Err(out_of_memory(what, bytes)),
        None => Err(out_of_memory(what, "more than 2^64")),
    }
}

fn out_of_memory(what: &str, bytes: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::OutOfMemory, format!("{what} needs {bytes} bytes"))
}

/// Bytes of memory this system could still provide, where it says so.
pub(in crate::backend) fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |key: &str| {
        info.lines().find_map(|l| l.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    Some((kib("MemAvailable:")?.saturating_add(kib("SwapFree:").unwrap_or(0))).saturating_mul(1024))
}

/// The program and the uploaded weights disagree; the model loader checks shapes, so this is its bug.
fn mismatch(expected: &str) -> Error {
    Error::new(ErrorKind::InvalidTensor, format!("the program expects {expected} here"))
}

/// `cap * tanh(value / cap)`, or the value where there is no cap.
fn softcap(value: f32, cap: Option<f32>) -> f32 {
    match cap {
        Some(cap) => cap * (value / cap).tanh(),
        None => value,
    }
}
