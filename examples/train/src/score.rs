//! How many answers are right, by the length of the chain and the number of passes.

use candle_core::{D, Tensor};
use hybrid_attention::Result;
use hybrid_attention::model::{Batch, Pass, Transformer};
use hybrid_attention::thought::{EncodedBatch, Thinking};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

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
/// counts the answers that are right after `passes` passes each. `thinking` says how to think with
/// a number of passes; `progress` is told of every length that is done.
///
/// # Errors
/// When the model cannot be run on the stories.
pub fn score(
    transformer: &Transformer,
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
                count += right_among(transformer, &thinking(passes), some, hops, &vocabulary)?;
            }
            right.push(count as f64 / stories as f64);
        }
        progress();
    }
    Ok(Scores { stories, chance, passes: passes.to_vec(), right })
}

/// How many of the stories, all of as many facts, get the right answer.
fn right_among(
    transformer: &Transformer,
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
    let rows = answers.len();
    let mut layout = Batch::dense(rows, ids.len() / rows.max(1))?;
    for row in 0..rows {
        layout = layout.with_context(row, std::slice::from_ref(&(0..context)))?;
    }
    let last = layout.seq() - 1;
    let hidden = read(transformer, thinking, &ids, layout)?.narrow(1, last, 1)?;
    let said: Vec<u32> =
        transformer.logits(&hidden)?.argmax(D::Minus1)?.flatten_all()?.to_vec1()?;
    Ok(said.iter().zip(&answers).filter(|(said, answer)| said == answer).count())
}

/// Thinks about the context of each row, then reads the whole of it: what leaves the last layer,
/// `(rows, seq, hidden)`.
///
/// # Errors
/// As the passes themselves.
pub fn read(
    transformer: &Transformer,
    thinking: &Thinking,
    ids: &[u32],
    layout: Batch,
) -> Result<Tensor> {
    let mind = thinking.on(transformer)?;
    let text = EncodedBatch::new(transformer, ids, layout)?;
    let first = mind.encode(&text, Pass::Causal(text.batch()))?;
    let thoughts = mind.think(&text, first, |_, _| ())?;
    mind.hand_off(&text, &thoughts, Pass::Causal(text.batch()))
}
