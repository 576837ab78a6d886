//! Sentence vectors, and which sentence is most similar to the first.
//!
//! ```text
//! cargo run --release --example embed -- PATH "a cat" "a tax return" "a kitten"
//! ```

#![allow(clippy::print_stdout, reason = "a program")]

use candle_core::Device;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::{EmbedConfig, HybridModel, Result, WeightType};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model = match args.next() {
        Some(path) => {
            let (checkpoint, kept) = (Checkpoint::open(path)?, WeightType::Stored);
            HybridModel::from_checkpoint(&checkpoint, kept, &Device::Cpu, |_, _| ())?
        }
        None => HybridModel::tiny(&Device::Cpu)?, // it knows only the few hundred words of its stories
    };
    let mut texts: Vec<String> = args.collect();
    if texts.is_empty() {
        texts = [
            "The coin is in the jar",
            "The coin lay in the jar",
            "Then Eva gave everything to Max",
        ]
        .map(String::from)
        .to_vec();
    }

    // For weights that were trained to see both ways: `.sight(Sight::Bidirectional)`.
    let vectors = model.embed(&texts, &EmbedConfig::default())?; // (texts, hidden), each of length 1
    let cosine = vectors.matmul(&vectors.t()?)?.to_vec2::<f32>()?; // which makes products cosines
    for (text, cosine) in texts.iter().zip(&cosine[0]) {
        println!("{cosine:.3}  {text}");
    }
    Ok(())
}
