//! Everything that `HybridModel::generate` does with the model, driven by hand with the same verbs:
//! encode, think, hand off, decode, and think again every few tokens. The tokens are those of
//! `generate`.

#![allow(clippy::print_stdout, reason = "a program")]

use hybrid_attention::candle_core::{Device, Tensor};
use hybrid_attention::model::{Batch, Pass};
use hybrid_attention::thought::{EncodedBatch, Entry};
use hybrid_attention::{GenerationConfig, HybridModel, Result, Thinking};

const PROMPT: &str = "The coin is in the jar. The jar is in the chest.\nWhere is the coin?\nIn the";
const TOKENS: usize = 6;
const RETHINK_EVERY: usize = 2;

/// A text of which all but the last token is thought about.
fn text(model: &HybridModel, ids: &[u32]) -> Result<EncodedBatch> {
    let batch = Batch::one(ids.len())?.with_context(0, &[0..ids.len() - 1])?;
    EncodedBatch::new(model.transformer(), ids, batch)
}

/// The likeliest next token after the last row of `h`, `(tokens, hidden)`.
fn next(model: &HybridModel, h: &Tensor) -> Result<u32> {
    let last = h.narrow(0, h.dim(0)? - 1, 1)?;
    Ok(model.transformer().logits(&last)?.argmax(1)?.to_vec1()?[0])
}

fn main() -> Result<()> {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let thinking = Thinking::new(3).span(1..3).rethink_every(RETHINK_EVERY);
    let mind = thinking.on(model.thought_model())?;
    let decoder = model.transformer();

    let mut ids = match model.tokenizer() {
        Some(tokenizer) => tokenizer.encode(PROMPT, true)?,
        None => Vec::new(),
    };
    let (prompt, mut cache) = (ids.len(), decoder.new_cache(256)?);

    // encode up to the span, think, hand off; the first thoughts are kept, to think again
    let encoded = text(&model, &ids)?;
    let mut first = mind.encode(&encoded, Pass::Cached(&mut cache))?; // (tokens, hidden)
    let thoughts = mind.think(&encoded, first.clone(), |_, _| ())?;
    let h = mind.hand_off(&encoded, &thoughts, Pass::Cached(&mut cache))?;
    ids.push(next(&model, &h)?);

    for count in 1..TOKENS {
        // the new token, up to the span
        let token = EncodedBatch::new(decoder, &ids[ids.len() - 1..], Batch::one(1)?)?;
        let xs = mind.encode(&token, Pass::Cached(&mut cache))?;
        first = Tensor::cat(&[&first, &xs], 0)?;
        let Entry { xs, layers } = match count % RETHINK_EVERY {
            0 => {
                // think about prompt and answer, and rebuild what that changes: here, all of it
                let encoded = text(&model, &ids)?;
                let thoughts = mind.think(&encoded, first.clone(), |_, _| ())?;
                mind.enter_again(&encoded, &thoughts, &mut cache, 0)?
            }
            _ => Entry { xs, layers: mind.span().start..decoder.all_layers().end },
        };
        let h = decoder.forward(&xs, layers, Pass::Cached(&mut cache))?;
        ids.push(next(&model, &h)?);
    }

    let config = GenerationConfig::default().thinking(thinking).max_tokens(TOKENS).eos_ids([]);
    let answer = model.generate(PROMPT, &config)?;
    println!("by hand:  {:?}\ngenerate: {:?}  {:?}", &ids[prompt..], answer.ids, answer.text);
    assert_eq!(ids[prompt..], answer.ids);
    Ok(())
}
