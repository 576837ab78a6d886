//! What a process keeps of memory that its other threads free, while there is a model and behind it.

use std::error::Error;
use std::process::Command;
use std::{env, fs, hint, thread};

use candle_core::Device;
use hybrid_attention::{HybridModel, keep_freed_memory};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Resident memory of this process in MiB, as Linux counts it.
fn resident() -> Result<usize> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).ok_or("no VmRSS")?;
    Ok(kib.parse::<usize>()? / 1024)
}

/// Eight threads that each use 120 MiB in blocks of 30, and free them. Something small that stays behind
/// them makes them holes in the threads' heaps.
fn use_memory_elsewhere() -> Result {
    let threads = (0..8).map(|_| {
        thread::spawn(|| {
            let blocks: Vec<_> = (0..4).map(|_| hint::black_box(vec![1u8; 30 << 20])).collect();
            Box::leak(hint::black_box(vec![1u8; 100].into_boxed_slice()));
            drop(blocks);
        })
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().map_err(|_| "a thread panicked")?;
    }
    Ok(())
}

/// A process of its own, as the allocator's settings are the whole process's.
const KEEP: &str = "HYBRID_ATTENTION_TEST_KEEP";

#[test]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn freed_memory_goes_back_with_the_last_model_or_at_once() -> Result {
    let Some(keep) = env::var_os(KEEP) else {
        for keep in ["yes", "no"] {
            let this = Command::new(env::current_exe()?).env(KEEP, keep).output()?;
            assert!(this.status.success(), "{keep}: {}", String::from_utf8_lossy(&this.stdout));
        }
        return Ok(());
    };
    if keep == "no" {
        keep_freed_memory(false);
    }
    let before = resident()?;
    let model = HybridModel::tiny(&Device::Cpu)?;
    let other = model.clone();
    let with_model = resident()?;
    drop(hint::black_box(vec![1u8; 24 << 20]));
    let kept = resident()?.saturating_sub(with_model);
    assert_eq!(kept > 16, keep == "yes", "{kept} MiB of a freed block of 24 stay");
    if keep == "yes" {
        use_memory_elsewhere()?;
        drop(model);
        let kept = resident()?.saturating_sub(before);
        assert!(kept > 200, "only {kept} MiB are kept, which shows nothing");
        drop(other);
        let kept = resident()?.saturating_sub(before);
        assert!(kept < 60, "{kept} MiB stay behind the last model");
    }
    Ok(())
}
