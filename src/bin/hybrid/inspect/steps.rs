//! Attention step by step: what is shown of one head, or of cosines.

use std::ops::Range;

use hybrid_attention::candle_core::Tensor;
use hybrid_attention::model::{Batch, Pass};
use hybrid_attention::steps::{AttentionSteps, CosineSteps, SoftmaxSteps};
use hybrid_attention::thought::{EncodedBatch, Map, Origin};
use hybrid_attention::{GenerationConfig, HybridModel, Prompt, Sight, Thinking};
use serde::Serialize;

use super::tokens;
use crate::terminal::Result;

/// What to work through.
#[derive(Clone, Copy, Debug)]
pub(super) enum Chosen {
    Head { layer: usize, head: usize },
    Cosines,
}

/// `10:3` or `cosine`
pub(super) fn parse_chosen(text: &str) -> std::result::Result<Chosen, String> {
    let head = text.split_once(':').and_then(|(layer, head)| {
        Some(Chosen::Head { layer: layer.parse().ok()?, head: head.parse().ok()? })
    });
    match text {
        "cosine" => Ok(Chosen::Cosines),
        _ => head.ok_or_else(|| "expected a layer and a head like 10:3, or cosine".to_string()),
    }
}

/// One computation from its beginning to its end.
#[derive(Serialize)]
pub(super) struct Worked {
    pub(super) what: What,
    pub(super) steps: Vec<Step>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    /// A head while the prompt is read causally, without thinking.
    Causal { layer: usize, head: usize },
    /// A head in a thought pass over the first thoughts.
    ThoughtPass { layer: usize, head: usize },
    /// The embeddings of the prompt, with cosines as scores.
    Cosine,
}

/// A matrix with a row for each token.
#[derive(Serialize)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) formula: &'static str,
    /// `null` where a token is not seen.
    pub(super) values: Map,
    #[serde(skip)]
    pub(super) columns: Columns,
}

/// What the columns of a step are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Columns {
    /// Those of a vector.
    Channels,
    /// Tokens that are looked at, with any numbers.
    Tokens,
    /// The same with shares, or what becomes shares: many are near 0.
    Shares,
    /// A single one.
    One,
}

/// The prompt's tokens, and all that was chosen. A head is shown twice where thinking runs its layer, too.
pub(super) fn work_through(
    model: &HybridModel,
    prompt: &Prompt,
    context_bytes: Option<usize>,
    thinking: &Thinking,
    chosen: &[Chosen],
) -> Result<(Vec<u32>, Vec<Worked>)> {
    let plain = GenerationConfig::default().thinking(Thinking::none());
    let read = model.think(prompt.clone(), &plain)?; // the embeddings
    let ids = read.origin.as_ref().map_or(&[][..], Origin::ids);
    let mut worked = Vec::new();
    for chosen in chosen {
        let &Chosen::Head { layer, head } = chosen else {
            let steps = of_cosines(&CosineSteps::of(&read.z)?)?;
            worked.push(Worked { what: What::Cosine, steps });
            continue;
        };
        let causal = model.attention_steps(prompt.clone(), Sight::Causal, layer, head)?;
        worked.push(Worked { what: What::Causal { layer, head }, steps: of_head(&causal)? });
        let mind = thinking.on(model.thought_model())?;
        if thinking.is_none() || !mind.span().contains(&layer) {
            continue;
        }
        let batch = Batch::one(ids.len())?.with_context(0, &runs(model, ids, context_bytes))?;
        let text = EncodedBatch::new(model.transformer(), ids, batch)?;
        let z = mind.encode(&text, Pass::Causal(text.batch()))?;
        for pass in mind.attention_steps(&z, text.batch(), layer, head)? {
            worked.push(Worked { what: What::ThoughtPass { layer, head }, steps: of_head(&pass)? });
        }
    }
    Ok((ids.to_vec(), worked))
}

/// The runs of tokens that are thought about.
fn runs(model: &HybridModel, ids: &[u32], context_bytes: Option<usize>) -> Vec<Range<usize>> {
    let (mut runs, mut end) = (Vec::new(), 0);
    let tokens = tokens::of_prompt(model.tokenizer(), ids, context_bytes);
    for run in tokens.chunk_by(|a, b| a.thinks == b.thinks) {
        end += run.len();
        if run.first().is_some_and(|token| token.thinks) {
            runs.push(end - run.len()..end);
        }
    }
    runs
}

fn of_head(it: &AttentionSteps) -> Result<Vec<Step>> {
    let mut steps = vec![
        step("queries q", "x W_qᵀ of the normed x, turned by position", &it.queries)?,
        step("keys k", "x W_kᵀ of the normed x, turned by position", &it.keys)?,
        step("values v", "x W_vᵀ of the normed x", &it.values)?,
    ];
    steps.extend(of_softmax(&it.softmax, ("scores", "q kᵀ / √d, where seen"))?);
    steps.extend([
        step("context", "weights · v", &it.context)?,
        step("share", "context · W_oᵀ, of this head alone", &it.share)?,
        step("output projection", "the sum of the shares of all heads", &it.projection)?,
        step("residual before", "what enters the layer", &it.before)?,
        step("residual after", "residual before + output projection", &it.after)?,
    ]);
    Ok(steps)
}

fn of_cosines(it: &CosineSteps) -> Result<Vec<Step>> {
    let mut steps =
        vec![step("embeddings x", "a row of the table for each token", &it.embeddings)?];
    steps.extend(of_softmax(&it.softmax, ("cosines", "xᵢ · xⱼ / (|xᵢ| |xⱼ|)"))?);
    steps.extend([
        step("context", "weights · x", &it.context)?,
        step("residual after", "x + context", &it.after)?,
    ]);
    Ok(steps)
}

fn of_softmax(
    it: &SoftmaxSteps,
    (name, formula): (&'static str, &'static str),
) -> Result<Vec<Step>> {
    let with = |columns, step: Step| Step { columns, ..step };
    let mut steps = vec![with(Columns::Tokens, step(name, formula, &it.scores)?)];
    let formula = match &it.maximum {
        Some(maximum) => {
            let maximum = step("row maximum", "the largest score of the row", maximum)?;
            steps.push(with(Columns::One, maximum));
            "exp(score − row maximum)"
        }
        None => "exp(cosine)",
    };
    let exponentials = step("exponentials", formula, &it.exponentials)?;
    steps.push(with(Columns::Shares, exponentials));
    steps
        .push(with(Columns::One, step("row sums", "the sum of the row's exponentials", &it.sums)?));
    let weights = step("weights", "exponential / row sum", &it.weights)?;
    steps.push(with(Columns::Shares, weights));
    Ok(steps)
}

fn step(name: &'static str, formula: &'static str, values: &Tensor) -> Result<Step> {
    Ok(Step { name, formula, values: values.to_vec2()?, columns: Columns::Channels })
}
