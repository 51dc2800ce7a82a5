//! All memory of the library goes through here: counted, and from the host's functions if it brings some.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crate::boundary::guard;
use crate::layout::{self, Out, Sized32, layout};
use crate::status::Failure;
use crate::status::awqua_status::{self, *};

/// Memory functions of the host. They are called from every thread that calls the library (and from its own ones, if
/// the engine was asked for some), must not call the library, and must not throw. Device drivers allocate their own
/// memory and are not covered.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_allocator {
    /// sizeof(awqua_allocator).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Handed to the functions.
    pub user: *mut c_void,
    /// `size` bytes (never 0) at a multiple of `align` (a power of two), or NULL.
    pub alloc: Option<unsafe extern "C" fn(user: *mut c_void, size: u64, align: u64) -> *mut c_void>,
    /// Takes back what `alloc` gave, with the same `size` and `align`.
    pub free: Option<unsafe extern "C" fn(user: *mut c_void, memory: *mut c_void, size: u64, align: u64)>,
}

// SAFETY: repr(C), u32 first, no padding on any supported target; integers, a pointer, nullable functions.
unsafe impl Sized32 for awqua_allocator {
    const NAME: &'static str = "awqua_allocator";
    const FIRST: usize = size_of::<Self>();
    const INIT: Self =
        Self { struct_size: size_of::<Self>() as u32, flags: 0, user: std::ptr::null_mut(), alloc: None, free: None };
}

/// Host memory of the library, over all engines.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_memory_stats {
    /// sizeof(awqua_memory_stats).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Bytes allocated now. Mapped files are not among them.
    pub bytes: u64,
    /// Most bytes ever allocated at once.
    pub peak_bytes: u64,
    /// Allocations made since the library was loaded. Stands still while a session decodes on the CPU.
    pub allocations: u64,
}

// SAFETY: repr(C), u32 first, no padding, integers.
unsafe impl Sized32 for awqua_memory_stats {
    const NAME: &'static str = "awqua_memory_stats";
    const FIRST: usize = 32;
    const INIT: Self =
        Self { struct_size: size_of::<Self>() as u32, flags: 0, bytes: 0, peak_bytes: 0, allocations: 0 };
}

struct Host(awqua_allocator);
// SAFETY: the host promises that its functions and `user` may be used from any thread.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

static STORE: OnceLock<Host> = OnceLock::new();
static HOST: AtomicPtr<Host> = AtomicPtr::new(std::ptr::null_mut());
static BYTES: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Routed;

#[global_allocator]
static GLOBAL: Routed = Routed;

fn host() -> Option<&'static awqua_allocator> {
    let host = HOST.load(Ordering::Acquire);
    // SAFETY: NULL, or the content of `STORE`, which is never dropped.
    unsafe { host.as_ref() }.map(|host| &host.0)
}

fn count(added: usize) {
    ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    let now = BYTES.fetch_add(added as u64, Ordering::Relaxed) + added as u64;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: memory comes from the system's allocator, or from the host's, which promises in its documentation what this
// trait asks for; the two are never mixed because the host's is set while nothing is allocated.
unsafe impl GlobalAlloc for Routed {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let memory = match host() {
            None => {
                // SAFETY: the caller's promise.
                unsafe { System.alloc(layout) }
            }
            Some(host) => match host.alloc {
                // SAFETY: the layout's size is not 0.
                Some(alloc) => unsafe { alloc(host.user, layout.size() as u64, layout.align() as u64) }.cast(),
                None => std::ptr::null_mut(),
            },
        };
        if !memory.is_null() {
            count(layout.size());
        }
        memory
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if host().is_none() {
            // Large zeroed blocks come from the system without being touched.
            // SAFETY: the caller's promise.
            let memory = unsafe { System.alloc_zeroed(layout) };
            if !memory.is_null() {
                count(layout.size());
            }
            return memory;
        }
        // SAFETY: the caller's promise.
        let memory = unsafe { self.alloc(layout) };
        if !memory.is_null() {
            // SAFETY: just allocated with this size.
            unsafe { memory.write_bytes(0, layout.size()) };
        }
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        match host() {
            // SAFETY: the caller's promise.
            None => unsafe { System.dealloc(memory, layout) },
            Some(host) => {
                if let Some(free) = host.free {
                    // SAFETY: `alloc` gave it with this layout.
                    unsafe { free(host.user, memory.cast(), layout.size() as u64, layout.align() as u64) };
                }
            }
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if host().is_none() {
            // SAFETY: the caller's promise.
            let moved = unsafe { System.realloc(memory, layout, size) };
            if !moved.is_null() {
                BYTES.fetch_sub(layout.size() as u64, Ordering::Relaxed);
                count(size);
            }
            return moved;
        }
        // SAFETY: the caller promises a valid size for this alignment.
        let layout_new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: as above.
        let moved = unsafe { self.alloc(layout_new) };
        if !moved.is_null() {
            // SAFETY: both blocks hold the smaller size and do not overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(memory, moved, layout.size().min(size));
                self.dealloc(memory, layout);
            }
        }
        moved
    }
}

/// Makes the library take its memory from the host. The first call into the library or never: fails with
/// AWQUA_ERR_STATE once anything was allocated. The functions must stay valid until the process ends.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_set_allocator(allocator: *const awqua_allocator) -> awqua_status {
    // Not behind `guard`, which allocates on its first use; nothing here can panic.
    if allocator.is_null() {
        crate::boundary::remember("`awqua_allocator` is NULL");
        return AWQUA_ERR_INVALID_ARGUMENT;
    }
    if BYTES.load(Ordering::Acquire) != 0 || !HOST.load(Ordering::Acquire).is_null() {
        crate::boundary::remember("the allocator must be set by the first call into the library");
        return AWQUA_ERR_STATE;
    }
    guard("awqua_set_allocator", || {
        // SAFETY: the caller's promise.
        let allocator = unsafe { layout::read(allocator) }?;
        if allocator.alloc.is_none() || allocator.free.is_none() {
            return Err(Failure::invalid("`alloc` or `free` of `awqua_allocator` is NULL"));
        }
        let host = STORE.get_or_init(|| Host(allocator));
        HOST.store(std::ptr::from_ref(host).cast_mut(), Ordering::Release);
        Ok(AWQUA_OK)
    })
}

/// Host memory the library holds, whoever provides it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_memory(stats: *mut awqua_memory_stats) -> awqua_status {
    guard("awqua_memory", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(stats) }?;
        out.write(&awqua_memory_stats {
            bytes: BYTES.load(Ordering::Relaxed),
            peak_bytes: PEAK.load(Ordering::Relaxed),
            allocations: ALLOCATIONS.load(Ordering::Relaxed),
            ..awqua_memory_stats::INIT
        });
        Ok(AWQUA_OK)
    })
}

layout!(awqua_allocator, 32, { struct_size: 0, flags: 4, user: 8, alloc: 16, free: 24 });
layout!(awqua_memory_stats, 32, { struct_size: 0, flags: 4, bytes: 8, peak_bytes: 16, allocations: 24 });
