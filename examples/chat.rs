//! A chat that keeps its conversation: what has been read is not read again.
//!
//! ```text
//! cargo run --release --example chat -- Mistral-7B-Instruct-v0.3
//! ```

#![allow(clippy::print_stdout, reason = "a program")]

use std::error::Error;
use std::io::Write;

use candle_core::Device;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::{HybridModel, Message, Prompt, WeightType};

fn main() -> Result<(), Box<dyn Error>> {
    let path =
        std::env::args().nth(1).ok_or("give the path of a checkpoint with a chat template")?;
    let (checkpoint, kept) = (Checkpoint::open(path)?, WeightType::Stored);
    let model = HybridModel::from_checkpoint(&checkpoint, kept, &Device::Cpu, |_, _| ())?;
    let config = model.generation_config().max_tokens(256);

    // The cache of this chat, and its messages. Both grow by what is new in each turn.
    let room = model.config().max_position_embeddings.min(4096);
    let mut conversation = model.conversation(room)?;
    let mut messages = vec![Message::system("Be brief.")];

    for line in std::io::stdin().lines() {
        messages.push(Message::user(line?));
        let prompt = Prompt::chat(&messages);
        let mut answer = String::new();
        let mut stream = model.stream_in(&mut conversation, prompt, &config)?;
        for token in &mut stream {
            let text = token?.text;
            print!("{text}");
            std::io::stdout().flush()?;
            answer.push_str(&text);
        }
        println!("   [{} of {} tokens known]", stream.kept(), stream.prompt_ids().len());
        messages.push(Message::assistant(answer.trim()));
    }
    Ok(())
}
