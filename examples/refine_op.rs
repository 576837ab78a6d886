//! A custom refinement: an op as a type, with a parameter, and one as a closure.
//!
//! ```text
//! cargo run --release --example refine_op
//! ```

#![allow(clippy::print_stdout, reason = "a program")]

use candle_core::{D, Device, Tensor};
use hybrid_attention::refine::{Refine, Step, seq};
use hybrid_attention::{Error, GenerationConfig, HybridModel, Prompt, Result, Thinking};

/// Moves by a share of the way to what the pass made of the thoughts, less in every pass.
#[derive(Debug)]
struct Settle {
    share: f64,
}

impl Refine for Settle {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        let share = self.share / (step.index + 1) as f64;
        Ok((step.z + ((xs - step.z)? * share)?)?) // same shape as xs
    }

    /// Called before any pass is run.
    fn validate(&self) -> Result<()> {
        match (0.0..=1.0).contains(&self.share) {
            true => Ok(()),
            false => Err(Error::Parameter {
                name: "share",
                expected: "a share in [0, 1]".into(),
                got: self.share.to_string(),
            }),
        }
    }
}

fn main() -> Result<()> {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let prompt = Prompt::default()
        .context("Then Eva gave everything to Max. Earlier, Leo had handed everything to Eva")
        .plain(".\nWho has what Leo had?\nIt is with");

    let refine = seq().add(Settle { share: 0.5 }).add_fn(|xs, step| {
        // Thoughts keep their length, token by token.
        let length = |xs: &Tensor| xs.sqr()?.sum_keepdim(D::Minus1)?.sqrt();
        Ok(xs.broadcast_mul(&(length(step.z)? / length(xs)?)?)?)
    });
    let thinking = Thinking::new(3).span(1..3).refine(refine);
    let config = GenerationConfig::default().thinking(thinking).max_tokens(1);
    let answer = model.generate(prompt, &config)?;
    println!("{}, after drifts of {:.3?}", answer.text.trim(), answer.drift());
    Ok(())
}
