//! Thinking by hand: the verbs that `generate` is written with, and the same tokens.
//!
//! ```text
//! cargo run --release --example by_hand
//! ```

#![allow(clippy::print_stdout, reason = "a program")]

use std::error::Error;

use candle_core::{D, Device, Tensor};
use hybrid_attention::model::{Layout, Pass};
use hybrid_attention::thought::Text;
use hybrid_attention::{GenerationConfig, HybridModel, Prompt};

const STORY: &str = "\
    Before that, the ring had been left in the drawer. That day, the book had been left in the chest. \
    Earlier, the bag was found in the jar. That day, the ball had been left in the ring. By then, the \
    chest is in the bag. That day, the apple had been hidden in the book. By then, the drawer is in the \
    apple";

fn main() -> Result<(), Box<dyn Error>> {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let (transformer, thinking) = (model.transformer(), model.thinking());
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let question = ".\nWhere is the ball?\nIn the";
    let (context, asked) = (tokenizer.encode(STORY, true)?, tokenizer.encode(question, false)?);

    // One text, of which the story is thought about and the question is only read.
    let ids = [context.as_slice(), &asked].concat();
    let layout =
        Layout::dense(1, ids.len()).with_context(0, std::slice::from_ref(&(0..context.len())))?;
    let text = Text::new(transformer, &ids, layout)?;
    let mut cache = transformer.new_cache(text.layout(), 64)?;

    let mind = thinking.on(transformer)?;
    let z = mind.encode(&text, Pass::Cached(&mut cache))?; // (1, seq, hidden)
    let thoughts = mind.think(&text, z, |done, passes| println!("pass {done} of {passes}"))?;
    let mut h = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?; // (1, seq, hidden)

    let mut answer = Vec::new();
    for _ in 0..4 {
        let last = h.narrow(1, h.dim(1)? - 1, 1)?; // (1, 1, hidden)
        let logits = transformer.logits(&last)?.flatten_all()?; // (vocab)
        let token = logits.argmax(D::Minus1)?.to_scalar::<u32>()?;
        answer.push(token);
        if model.eos_ids().contains(&token) {
            break;
        }
        let xs = transformer.embed(&Tensor::new(&[[token]], transformer.device())?)?;
        h = transformer.forward(&xs, transformer.all_layers(), Pass::Cached(&mut cache))?;
    }
    println!("{}", tokenizer.decode(&answer, true).trim());

    let prompt = Prompt::default().context_ids(&context).plain_ids(&asked);
    let config = GenerationConfig::default().thinking(thinking.clone()).max_tokens(4);
    assert_eq!(answer, model.generate(prompt, &config)?.ids);
    Ok(())
}
