//! How many answers are right, by the length of the chain and the number of passes.

use candle_core::{D, Tensor};
use hybrid_attention::Result;
use hybrid_attention::model::{Batch, ForwardContext, Pass};
use hybrid_attention::thought::{EncodedBatch, Thinking, ThoughtModel};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::settings::{Arm, Settings};
use flashback_suite::{LONGEST, Plan, Split, Story, Vocabulary};

/// The share of right answers over stories of one split.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Scores {
    /// Stories for each length.
    pub stories: usize,
    /// What a guess among the ends of all chains would get, for chains of 1, 2, … facts.
    pub chance: Vec<f64>,
    /// The numbers of passes that were tried.
    pub passes: Vec<usize>,
    /// For each number of passes, the shares for chains of 1, 2, … facts.
    pub right: Vec<Vec<f64>>,
}

/// Draws `stories` stories for each length of chain, asks about the first link of such a chain, and
/// counts the right answers after each number of `passes`. `thinking` says how to think with a number of
/// passes; `progress` is called for every length that is done.
///
/// # Errors
/// When the model cannot be run on the stories.
pub fn score(
    model: &ThoughtModel,
    thinking: impl Fn(usize) -> Thinking,
    split: Split,
    stories: usize,
    passes: &[usize],
    seed: u64,
    mut progress: impl FnMut(),
) -> Result<Scores> {
    let vocabulary = Vocabulary::default();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut chance = Vec::new();
    let mut right = vec![Vec::new(); passes.len()];
    for hops in 1..=LONGEST {
        let plan = Plan::examination(split, hops);
        let drawn: Vec<Story> = (0..stories).map(|_| Story::draw(&plan, &mut rng)).collect();
        chance.push(drawn.iter().map(|it| 1.0 / it.ends as f64).sum::<f64>() / stories as f64);
        for (right, &passes) in right.iter_mut().zip(passes) {
            let mut count = 0;
            for some in drawn.chunks(50) {
                count += right_among(model, &thinking(passes), some, hops, &vocabulary)?;
            }
            right.push(count as f64 / stories as f64);
        }
        progress();
    }
    Ok(Scores { stories, chance, passes: passes.to_vec(), right })
}

/// How many of the stories, all with the same number of facts, get the right answer.
fn right_among(
    model: &ThoughtModel,
    thinking: &Thinking,
    stories: &[Story],
    hops: usize,
    vocabulary: &Vocabulary,
) -> Result<usize> {
    let (mut ids, mut answers, mut context) = (Vec::new(), Vec::new(), 0);
    for story in stories {
        let Some(question) = story.question_of(hops) else { continue };
        let told = story.ids(vocabulary);
        context = told.len();
        ids.extend(told);
        ids.extend(story.ask_ids(question, vocabulary));
        answers.push(story.answer_id(question, vocabulary));
    }
    let stories = answers.len();
    let mut batch = Batch::dense(stories, ids.len() / stories.max(1))?;
    for sequence in 0..stories {
        batch = batch.with_context(sequence, std::slice::from_ref(&(0..context)))?;
    }
    let last: Vec<u32> = batch.all_rows().map(|rows| rows.end as u32 - 1).collect();
    let hidden = read(model, thinking, &ids, batch)?; // (tokens, hidden)
    let last = hidden.index_select(&Tensor::new(last, hidden.device())?, 0)?;
    let said: Vec<u32> = model.decoder().logits(&last)?.argmax(D::Minus1)?.to_vec1()?;
    Ok(said.iter().zip(&answers).filter(|(said, answer)| said == answer).count())
}

/// Thinks about the context of each sequence, then reads all of it; returns what leaves the last layer,
/// `(tokens, hidden)`.
///
/// # Errors
/// As the passes themselves.
pub fn read(
    model: &ThoughtModel,
    thinking: &Thinking,
    ids: &[u32],
    batch: Batch,
) -> Result<Tensor> {
    let mind = thinking.on(model)?;
    let text = EncodedBatch::new(model.decoder(), ids, batch)?;
    let first = mind.encode(&text, Pass::Causal(text.batch()))?;
    let thoughts = mind.think(&text, first, |_, _| ())?;
    mind.hand_off(&text, &thoughts, Pass::Causal(text.batch()))
}

/// Reads as an arm does, with so many passes: what leaves the last layer, `(tokens, hidden)`. [`Arm::Whole`] is one reading
/// by all layers of the mind that thinks, in which the tokens of a context see each other both ways.
///
/// # Errors
/// As the passes themselves.
pub(crate) fn read_by(
    model: &ThoughtModel,
    settings: &Settings,
    (arm, passes): (Arm, usize),
    ids: &[u32],
    batch: Batch,
) -> Result<Tensor> {
    if arm == Arm::Whole {
        let thinker = model.thinker();
        let context = ForwardContext::from(Pass::Bidirectional(&batch));
        return thinker.forward(&thinker.embed_ids(ids)?, thinker.all_layers(), context);
    }
    let thinking = settings.thinking(passes).gradient_passes(settings.gradient_passes);
    read(model, &thinking, ids, batch)
}
