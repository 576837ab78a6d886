//! One question, answered without and with thinking about it first.
//!
//! ```text
//! cargo run --release --example generate
//! cargo run --release --example generate -- Mistral-7B-Instruct-v0.3 "Why is the sky blue?"
//! ```

#![allow(clippy::print_stdout, reason = "a program")]

use std::io::Write;

use candle_core::Device;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::{HybridModel, Prompt, Result, Thinking, WeightType};

/// What the model that comes with the crate understands; trying the example needs no other.
const STORY: &str = "\
    Before that, the ring had been left in the drawer. That day, the book had been left in the chest. \
    Earlier, the bag was found in the jar. That day, the ball had been left in the ring. By then, the \
    chest is in the bag. That day, the apple had been hidden in the book. By then, the drawer is in the \
    apple";

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (path, question) = (args.next(), args.next());
    let model = match path {
        // A folder from Hugging Face, or a GGUF file, its weights kept as they are stored.
        Some(path) => {
            let (checkpoint, kept) = (Checkpoint::open(path)?, WeightType::Stored);
            HybridModel::from_checkpoint(&checkpoint, kept, &Device::Cpu, |_, _| ())?
        }
        None => HybridModel::tiny(&Device::Cpu)?,
    };
    let prompt = match question {
        Some(question) => Prompt::from(question),
        // A story to think about, and a question that is only read.
        None => Prompt::default().context(STORY).plain(".\nWhere is the ball?\nIn the"),
    };

    for thinking in [Thinking::none(), model.thinking().clone()] {
        let config = model.generation_config().thinking(thinking.clone()).max_tokens(64);
        let mut stream = model.stream(prompt.clone(), &config)?;
        for token in &mut stream {
            print!("{}", token?.text); // each as soon as it is ready; dropping the stream cancels it
            std::io::stdout().flush().ok();
        }
        let passes = stream.traces().first().map_or(0, |trace| trace.passes.len());
        println!("   [after {passes} thought passes; stopped by {:?}]", stream.stop());
    }
    Ok(())
}
