//! Two paths to the next state of a story: a matrix that holds for all stories, or one made of this story's past.
//!
//! ```text
//! cargo run --release --example transition
//! ```

#![allow(clippy::print_stdout, reason = "a program")]

use std::error::Error;

use candle_core::Device;
use flashback_suite::{Plan, Split, Story};
use hybrid_attention::HybridModel;
use hybrid_attention::statistics::{Figures, Transition, TransitionConfig, states};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// The layer whose states are told apart.
const LAYER: usize = 2;

fn main() -> Result<(), Box<dyn Error>> {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut stories = Vec::new();
    for _ in 0..40 {
        let story = Story::draw(&Plan::examination(Split::Test, 6), &mut rng);
        let ids = tokenizer.encode(&story.text(), true)?;
        stories.push(states(model.transformer(), &ids, LAYER)?); // (tokens, hidden)
    }
    let transition = Transition::fit(&stories, &TransitionConfig::default())?;

    let Figures { default, generated, closer, gated, steps } = transition.figures();
    println!("{steps} steps of stories that were held out, nats each:");
    println!("{default:.3}  by how often each state follows each in other stories");
    println!("{generated:.3}  by what this story did before");
    println!("{closer:.3}  by the closer of the two, which is not known beforehand");
    println!("{gated:.3}  by the one that the gate chooses");

    let (walk, next) = (transition.walk(&stories[0])?, transition.next(&stories[0])?);
    let likely = (0..next.len()).max_by(|a, b| next[*a].total_cmp(&next[*b])).ok_or("no states")?;
    println!("\nThe first goes {:?} …", &walk[..8.min(walk.len())]);
    println!("and after its end to {likely} with a probability of {:.2}.", next[likely]);
    Ok(())
}
