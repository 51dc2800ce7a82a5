//! Work in order: copies, kernel calls, places in a stream, and recorded work.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;
use cudarc::driver::sys::CUresult;

use super::library::check;
use super::{Buffer, Current, Function, Gpu, Pinned};
use crate::error::Result;

/// Work in order.
pub struct Stream {
    pub(super) gpu: Arc<Gpu>,
    pub(super) stream: sys::CUstream,
    /// See [`Self::take_queued`].
    pub(super) queued: AtomicBool,
}

// SAFETY: as for `Gpu`.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// A kernel call.
#[derive(Clone)]
pub struct Launch {
    /// The kernel.
    pub function: Function,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// The arguments' bytes, in units that align them.
    pub arguments: Vec<u64>,
    /// Whether it waits for the one in front by itself, so that it may begin earlier.
    pub overlaps: bool,
}

impl Launch {
    /// A call with `arguments` by value.
    pub fn new<A: bytemuck::Pod>(function: Function, grid: [u32; 3], threads: u32, shared: u32, arguments: &A) -> Self {
        let mut words = vec![0; size_of::<A>().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..size_of::<A>()].copy_from_slice(bytemuck::bytes_of(arguments));
        Self { function, grid, threads, shared, arguments: words, overlaps: true }
    }
}

/// A rectangle of bytes for [`Stream::copy_rows`].
#[derive(Clone, Copy)]
pub struct Rows {
    /// First byte of the first row on the device.
    pub offset: usize,
    /// Bytes of a row that are copied.
    pub width: usize,
    /// Rows.
    pub rows: usize,
    /// Bytes from one row to the next on the device.
    pub pitch: usize,
    /// The first byte and the bytes from one row to the next on the other side.
    pub other_offset: usize,
    pub other_pitch: usize,
}

impl Stream {
    /// Copies `data` to `buffer` from byte `offset` on. Returns when `data` is free again.
    ///
    /// # Errors
    /// A device error.
    pub fn upload(&self, buffer: &Buffer, offset: u64, data: &[u8]) -> Result<()> {
        assert!(offset + data.len() as u64 <= buffer.bytes, "the data fits the buffer");
        if data.is_empty() {
            return Ok(());
        }
        let _current = self.enter()?;
        // SAFETY: both ranges are valid; the driver has copied memory that is not pinned when the call returns.
        let code = unsafe {
            sys::cuMemcpyHtoDAsync_v2(buffer.address + offset, data.as_ptr().cast(), data.len(), self.stream)
        };
        self.gpu.noting(check(code, "uploading"))
    }

    /// Copies the first `bytes` of `from` to `buffer`; `from` must stay as it is until the stream has come there.
    ///
    /// # Errors
    /// A device error.
    pub fn upload_pinned(&self, buffer: &Buffer, offset: u64, from: &Pinned, bytes: usize) -> Result<()> {
        assert!(offset + bytes as u64 <= buffer.bytes && bytes <= from.bytes, "the data fits the buffer");
        let _current = self.enter()?;
        // SAFETY: both ranges are valid; the caller keeps `from`.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(buffer.address + offset, from.host.cast(), bytes, self.stream) };
        self.gpu.noting(check(code, "uploading"))
    }

    /// Copies bytes of `buffer` to `out` and waits for it.
    ///
    /// # Errors
    /// A device error.
    pub fn download(&self, buffer: &Buffer, offset: u64, out: &mut [u8]) -> Result<()> {
        assert!(offset + out.len() as u64 <= buffer.bytes, "the data lies in the buffer");
        if out.is_empty() {
            return Ok(());
        }
        let current = self.enter()?;
        // SAFETY: both ranges are valid, and `out` is borrowed until the stream has come there.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), buffer.address + offset, out.len(), self.stream)
        };
        self.gpu.noting(check(code, "reading back"))?;
        drop(current);
        self.wait()
    }

    /// Copies bytes of `buffer` to the start of `to`; they are there once the stream has come there.
    ///
    /// # Errors
    /// A device error.
    pub fn download_pinned(&self, buffer: &Buffer, offset: u64, to: &Pinned, bytes: usize) -> Result<()> {
        assert!(offset + bytes as u64 <= buffer.bytes && bytes <= to.bytes, "the data lies in the buffer");
        let _current = self.enter()?;
        // SAFETY: both ranges are valid; the owner of `to` waits before it reads or frees it.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to.host.cast(), buffer.address + offset, bytes, self.stream) };
        self.gpu.noting(check(code, "reading back"))
    }

    /// Copies rows between `buffer` and host memory and waits for it, or queues a copy to another buffer.
    ///
    /// # Errors
    /// A device error.
    pub fn copy_rows(&self, buffer: &Buffer, rows: Rows, other: OtherRows<'_>) -> Result<()> {
        if rows.width * rows.rows == 0 {
            return Ok(());
        }
        let end = rows.offset + (rows.rows - 1) * rows.pitch + rows.width;
        assert!(end as u64 <= buffer.bytes && rows.width <= rows.pitch, "the rows lie in the buffer");
        let other_end = rows.other_offset + (rows.rows - 1) * rows.other_pitch + rows.width;
        assert!(rows.width <= rows.other_pitch, "the rows lie side by side");
        let waits = !matches!(other, OtherRows::Device(_));
        let (device, memory) = (sys::CUmemorytype::CU_MEMORYTYPE_DEVICE, sys::CUmemorytype::CU_MEMORYTYPE_HOST);
        let mut copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: buffer.address + rows.offset as u64,
            srcArray: std::ptr::null_mut(),
            srcPitch: rows.pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: buffer.address + rows.offset as u64,
            dstArray: std::ptr::null_mut(),
            dstPitch: rows.pitch,
            WidthInBytes: rows.width,
            Height: rows.rows,
        };
        match other {
            OtherRows::From(from) => {
                assert!(other_end <= from.len(), "the rows lie in the memory");
                let from = from[rows.other_offset..].as_ptr().cast();
                (copy.srcMemoryType, copy.srcHost, copy.srcPitch) = (memory, from, rows.other_pitch);
            }
            OtherRows::To(to) => {
                assert!(other_end <= to.len(), "the rows lie in the memory");
                let to = to[rows.other_offset..].as_mut_ptr().cast();
                (copy.dstMemoryType, copy.dstHost, copy.dstPitch) = (memory, to, rows.other_pitch);
            }
            OtherRows::Device(to) => {
                assert!(other_end as u64 <= to.bytes, "the rows lie in the buffer");
                (copy.dstDevice, copy.dstPitch) = (to.address + rows.other_offset as u64, rows.other_pitch);
            }
        }
        let current = self.enter()?;
        // SAFETY: all ranges were checked, and borrows of host memory last until the stream has come there; buffers are
        // freed once the device has done what was queued.
        self.gpu.noting(check(unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream) }, "copying rows"))?;
        drop(current);
        if waits { self.wait() } else { Ok(()) }
    }

    /// Sets a whole buffer to zero.
    ///
    /// # Errors
    /// A device error.
    pub fn clear(&self, buffer: &Buffer) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the range is the buffer's.
        let code = unsafe { sys::cuMemsetD8Async(buffer.address, 0, buffer.bytes as usize, self.stream) };
        self.gpu.noting(check(code, "clearing memory"))
    }

    /// Queues a kernel call.
    ///
    /// # Safety
    /// The arguments have to be those of the kernel; the addresses in them those of memory that is there, large enough
    /// for what the kernel does with it, and stays until the stream has come there.
    ///
    /// # Errors
    /// A device error.
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let _current = self.enter()?;
        let mut arguments = [launch.arguments.as_ptr().cast_mut().cast::<c_void>()];
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream,
            attrs: &mut overlap,
            numAttrs: c_uint::from(launch.overlaps && self.gpu.limits.overlap),
        };
        // SAFETY: the kernel takes one structure by value, whose bytes these are; the rest is the caller's promise.
        let code =
            unsafe { sys::cuLaunchKernelEx(&config, launch.function.0, arguments.as_mut_ptr(), std::ptr::null_mut()) };
        self.gpu.noting(check(code, "starting a kernel"))
    }

    /// Marks the place that the stream has come to.
    ///
    /// # Errors
    /// A device error.
    pub fn record(&self, event: &Event) -> Result<()> {
        let _current = self.gpu.enter()?;
        // SAFETY: both belong to the same context.
        self.gpu.noting(check(unsafe { sys::cuEventRecord(event.event, self.stream) }, "marking a place"))
    }

    /// Has what is queued from now on wait for the place of `event`, in this or another stream.
    ///
    /// # Errors
    /// A device error.
    pub fn follow(&self, event: &Event) -> Result<()> {
        let _current = self.gpu.enter()?;
        // SAFETY: both belong to the same context; the driver keeps the place if the event is recorded again.
        self.gpu.noting(check(unsafe { sys::cuStreamWaitEvent(self.stream, event.event, 0) }, "ordering streams"))
    }

    /// Whether something was queued since this was asked last.
    pub fn take_queued(&self) -> bool {
        self.queued.swap(false, Ordering::Relaxed)
    }

    /// Notes that something is about to be queued, and makes the device's context current.
    fn enter(&self) -> Result<Current> {
        self.queued.store(true, Ordering::Relaxed);
        self.gpu.enter()
    }

    /// Waits for everything queued.
    ///
    /// # Errors
    /// A device error.
    pub fn wait(&self) -> Result<()> {
        let _current = self.gpu.enter()?;
        // SAFETY: the stream is valid.
        self.gpu.noting(check(unsafe { sys::cuStreamSynchronize(self.stream) }, "waiting for the device"))
    }

    /// What `work` queues, as a graph that can be queued again and again.
    ///
    /// # Errors
    /// What `work` returns, or a device error.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let current = self.gpu.enter()?;
        // SAFETY: the stream is valid.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) }, "recording a graph")?;
        let done = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: the pointer is to a local variable.
        let ended = check(unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) }, "recording a graph");
        let mut exec = std::ptr::null_mut();
        let result = done.and(ended).and_then(|()| {
            // SAFETY: the graph was just recorded.
            check(unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }, "preparing a graph")
        });
        if !graph.is_null() {
            // SAFETY: the graph is ours; what was made of it does not need it.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        drop(current);
        result?;
        Ok(Graph { gpu: self.gpu.clone(), exec })
    }

    /// Queues a graph.
    ///
    /// # Errors
    /// A device error.
    pub fn launch_graph(&self, graph: &Graph) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: both belong to the same context.
        self.gpu.noting(check(unsafe { sys::cuGraphLaunch(graph.exec, self.stream) }, "starting a graph"))
    }
}

/// The other side of [`Stream::copy_rows`].
pub enum OtherRows<'a> {
    /// Read from the host.
    From(&'a [u8]),
    /// Written to the host.
    To(&'a mut [u8]),
    /// Another buffer, written.
    Device(&'a Buffer),
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the stream is ours; the driver lets queued work end.
        unsafe {
            if sys::cuCtxPushCurrent_v2(self.gpu.context) == CUresult::CUDA_SUCCESS {
                let _current = Current;
                let _ = sys::cuStreamSynchronize(self.stream);
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
        }
    }
}

/// A place in a stream.
pub struct Event {
    pub(super) gpu: Arc<Gpu>,
    pub(super) event: sys::CUevent,
}

// SAFETY: as for `Gpu`.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Whether the device has come there.
    ///
    /// # Errors
    /// What went wrong on the device before.
    pub fn is_reached(&self) -> Result<bool> {
        let _current = self.gpu.enter()?;
        // SAFETY: the event is valid.
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => self.gpu.noting(check(code, "waiting for the device")).map(|()| true),
        }
    }

    /// Waits until the device has come there.
    ///
    /// # Errors
    /// As [`Self::is_reached`].
    pub fn wait(&self) -> Result<()> {
        let _current = self.gpu.enter()?;
        // SAFETY: the event is valid.
        self.gpu.noting(check(unsafe { sys::cuEventSynchronize(self.event) }, "waiting for the device"))
    }

    /// Seconds from `self` to `later`, both of which the device has reached.
    ///
    /// # Errors
    /// A device error.
    pub fn seconds_to(&self, later: &Self) -> Result<f64> {
        let _current = self.gpu.enter()?;
        let mut milliseconds = 0.0;
        // SAFETY: both are valid, the pointer is to a local variable.
        let code = unsafe { sys::cuEventElapsedTime(&mut milliseconds, self.event, later.event) };
        self.gpu.noting(check(code, "reading times"))?;
        Ok(f64::from(milliseconds) * 1e-3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is ours.
        unsafe {
            if sys::cuCtxPushCurrent_v2(self.gpu.context) == CUresult::CUDA_SUCCESS {
                let _current = Current;
                let _ = sys::cuEventDestroy_v2(self.event);
            }
        }
    }
}

/// Recorded work.
pub struct Graph {
    gpu: Arc<Gpu>,
    exec: sys::CUgraphExec,
}

// SAFETY: as for `Gpu`.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the graph is ours; the driver lets launches of it end.
        unsafe {
            if sys::cuCtxPushCurrent_v2(self.gpu.context) == CUresult::CUDA_SUCCESS {
                let _current = Current;
                let _ = sys::cuGraphExecDestroy(self.exec);
            }
        }
    }
}
