//! Memory is given back: what a model, its answers and its caches took is free when they are dropped.
//!
//! Everything that this binary allocates is counted, so its one test runs by itself.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicIsize, Ordering};

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use hybrid_attention::load::WeightType;
use hybrid_attention::refine::{CosineReweight, Interpolate, seq};
use hybrid_attention::{Config, GenerationConfig, HybridModel, Prompt, Thinking};

use common::{Result, tiny, write_gguf, write_hugging_face};

/// The system's allocator, with a count of the bytes that are out.
struct Counting;

static LIVE: AtomicIsize = AtomicIsize::new(0);

// SAFETY: all is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_add(size as isize - layout.size() as isize, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// 3.4 million weights.
fn config() -> Config {
    Config {
        vocab_size: 512,
        hidden_size: 256,
        intermediate_size: 1024,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        sliding_window: Some(32),
        ..tiny::config()
    }
}

/// Loads a model, answers with and without thinking, at once, streamed, side by side and in a
/// conversation, and drops all of it.
fn use_and_drop(path: &Path, kept: WeightType) -> Result<isize> {
    let before = LIVE.load(Ordering::Relaxed);
    let model = match path.is_dir() {
        true => HybridModel::from_folder(path, kept, &Device::Cpu)?,
        false => HybridModel::from_gguf(path, kept, &Device::Cpu)?,
    };
    let taken = LIVE.load(Ordering::Relaxed) - before;
    let prompt: Vec<u32> = (0..70).map(|at| at * 7 % 512).collect();
    let plain = GenerationConfig::default().max_tokens(12).eos_ids([]);
    let refine = seq().add(CosineReweight::mix(0.1)).add(Interpolate::new(0.3));
    let thinks = plain.clone().thinking(Thinking::new(2).refine(refine));
    for config in [&plain, &thinks] {
        model.generate(prompt.as_slice(), config)?;
        let mut conversation = model.conversation(256)?;
        model.stream_in(&mut conversation, prompt.as_slice(), config)?.take(5).for_each(drop);
        model.stream_in(&mut conversation, prompt.as_slice(), config)?.collect_answer()?;
        // Side by side, and forked; the last ones are never read to their end.
        let prompts = [&prompt[..], &prompt[..9], &prompt[..50]];
        model.generate_many(prompts, config)?.next().ok_or("no answer")?.1?;
        let mut other = conversation.fork();
        model.stream_in(&mut other, prompt.as_slice(), config)?.next().ok_or("no token")??;
        model.stream(Prompt::from(prompt.clone()), config)?.next().ok_or("no token")??;
    }
    Ok(taken)
}

/// How often `path` is mapped into this process; `None` where that cannot be asked.
fn mappings(path: &Path) -> Option<usize> {
    let (maps, path) = (fs::read_to_string("/proc/self/maps").ok()?, path.to_str()?);
    Some(maps.lines().filter(|line| line.contains(path)).count())
}

#[test]
#[allow(clippy::print_stderr, reason = "says what it could not look at")]
fn memory_is_given_back_on_drop() -> Result {
    let folder = tempfile::tempdir()?;
    let (config, gguf) = (config(), folder.path().join("model.gguf"));
    let tensors = tiny::weights(&config, 3)?.into_iter().collect();
    write_hugging_face(folder.path(), &config, &tensors)?;
    write_gguf(&gguf, &config, &tensors, GgmlDType::Q8_0)?;
    drop(tensors);
    let ways = [
        (folder.path(), WeightType::Stored),
        (folder.path(), WeightType::Quantized(GgmlDType::Q4K)),
        (gguf.as_path(), WeightType::Stored),
    ];
    // What every thread keeps for the next product is there after a few rounds.
    let warm_up = 2;
    let mut start = 0;
    for round in 0..warm_up + 3 {
        if round == warm_up {
            start = LIVE.load(Ordering::Relaxed);
        }
        for (path, kept) in ways {
            let taken = use_and_drop(path, kept)?;
            assert!(taken > 2 << 20, "{kept:?} took {taken} bytes");
        }
    }
    // A cache or a matrix that stayed in each of these rounds would be a megabyte at least.
    let left = LIVE.load(Ordering::Relaxed) - start;
    assert!(left.abs() < 64 << 10, "{left} bytes are left of three rounds");
    match mappings(folder.path()) {
        Some(mappings) => assert_eq!(mappings, 0),
        None => eprintln!("not looked at: this system does not say what is mapped"),
    }
    Ok(())
}
