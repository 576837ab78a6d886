//! What the C library keeps of freed memory while there are models.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static KEEP: AtomicBool = AtomicBool::new(true);
static MODELS: AtomicUsize = AtomicUsize::new(0);

/// Whether models make the C library's allocator keep freed memory for later, in the whole process; to be
/// said before the first model is made. Default yes.
///
/// With glibc's allocator, memory of a pass that is given back to the system has to be asked for, and
/// zeroed by it, for the next pass: about a tenth of the time of a pass over 512 tokens. So the first
/// model raises, once and for good, the size from which glibc gives blocks back by themselves to just
/// under 32 MiB. What any thread of the process frees in smaller blocks then stays resident until it is
/// used again. When the last model is dropped, `malloc_trim` gives back what is free, but for what lies at
/// the end of another thread's heap.
///
/// Apart from that, each thread that multiplies keeps room of 192 bytes for each token of the longest
/// pass, and 96 KiB, as long as it lives. Other allocators are never touched.
///
/// ```
/// use candle_core::Device;
/// use hybrid_attention::{HybridModel, keep_freed_memory};
///
/// keep_freed_memory(false); // a server that does more than run models
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// # let _ = model;
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
pub fn keep_freed_memory(keep: bool) {
    KEEP.store(keep, Ordering::Relaxed);
}

/// Freed memory is kept as long as there is one of these.
#[derive(Debug)]
pub(crate) struct FreedMemory(());

impl FreedMemory {
    pub(crate) fn kept() -> Self {
        // glibc gives back what is free beyond twice the largest block that was ever freed, up to 32 MiB,
        // and takes larger blocks straight from the system. So one is freed here, as any program may.
        const JUST_UNDER: usize = (32 << 20) - (64 << 10);
        static ONCE: Once = Once::new();
        MODELS.fetch_add(1, Ordering::Relaxed);
        if KEEP.load(Ordering::Relaxed) {
            ONCE.call_once(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(JUST_UNDER))));
        }
        Self(())
    }
}

impl Drop for FreedMemory {
    fn drop(&mut self) {
        if MODELS.fetch_sub(1, Ordering::Relaxed) == 1 && KEEP.load(Ordering::Relaxed) {
            trim();
        }
    }
}

/// Gives free memory back to the system.
fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> c_int;
        }
        // SAFETY: glibc's own, of this signature; it may be called at any time and by several threads,
        // and touches nothing that is in use. Where another allocator serves Rust, it finds little.
        unsafe { malloc_trim(0) };
    }
}
