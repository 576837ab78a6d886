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

/// Eight threads that each use 120 MiB in blocks of 30, and free them. With something small `behind` them
/// that stays, they are holes in the threads' heaps.
fn use_memory_elsewhere(behind: bool) -> Result {
    let threads = (0..8).map(|_| {
        thread::spawn(move || {
            let blocks: Vec<_> = (0..4).map(|_| hint::black_box(vec![1u8; 30 << 20])).collect();
            if behind {
                Box::leak(hint::black_box(vec![1u8; 100].into_boxed_slice()));
            }
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
    use_memory_elsewhere(keep == "yes")?;
    if keep == "no" {
        let kept = resident()? - before;
        assert!(kept < 150, "{kept} MiB stay beside a model");
    }
    drop(model);
    if keep == "yes" {
        let kept = resident()? - before;
        assert!(kept > 200, "only {kept} MiB are kept, which shows nothing");
    }
    drop(other);
    let kept = resident()?.saturating_sub(before);
    assert!(kept < 60, "{kept} MiB stay behind the last model");
    Ok(())
}
