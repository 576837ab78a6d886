//! What a pass has freed, the next one takes up again: no page is asked of the system anew.
//!
//! Pages are counted for the whole process, so its one test runs by itself.

#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod common;

use candle_core::{Device, Tensor};
use hybrid_attention::Config;
use hybrid_attention::model::{Batch, Pass, Transformer};

use common::{Result, tiny};

/// Pages that this process has been given so far.
fn pages() -> Result<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name in brackets may hold anything; behind it, `minflt` is the eighth.
    let (_, fields) = stat.rsplit_once(')').ok_or("no name")?;
    Ok(fields.split_whitespace().nth(7).ok_or("no minflt")?.parse()?)
}

#[test]
fn a_second_pass_needs_no_new_memory() -> Result {
    let config = Config {
        hidden_size: 512,
        intermediate_size: 1536,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 64,
        max_position_embeddings: 1024,
        ..tiny::config()
    };
    let model = Transformer::new(&config, &mut tiny::weights(&config, 1)?)?;
    let xs = Tensor::randn(0f32, 1.0, (512, 512), &Device::Cpu)?;
    let batch = Batch::one(512)?;
    // The first passes on each thread of the pool take up what later ones use again.
    let mut fewest = u64::MAX;
    for _ in 0..12 {
        let before = pages()?;
        model.forward(&xs, model.all_layers(), Pass::Bidirectional(&batch))?;
        fewest = fewest.min(pages()? - before);
    }
    // Given back and asked for again, the results of a layer are this many in every pass.
    let of_layer = 4 * 512 * (4 * 512 + 2 * 128 + 2 * 1536) / 4096;
    assert!(fewest < of_layer / 8, "{fewest} pages at least, of a layer's {of_layer}");
    Ok(())
}
