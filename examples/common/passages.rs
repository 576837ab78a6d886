//! Passages in two halves: the first is thought about, the second only read, and the figure is how
//! surprised a model is by it, in nats per token.

use hybrid_attention::{GenerationConfig, HybridModel, Prompt, Thinking};
use serde::Serialize;

use super::Result;

/// Two neighbouring stretches of a text.
pub struct Passage {
    pub first: Vec<u32>,
    pub second: Vec<u32>,
    /// Whether `first` opens with the token that begins a text.
    pub begins: bool,
    /// Tokens from the first on that are only read.
    pub only_read: usize,
}

impl Passage {
    /// As when `first` is a prompt and `second` its answer: the prompt's last token is only read.
    pub fn prompt(&self) -> Prompt {
        let (context, last) = self.first.split_at(self.first.len().saturating_sub(1));
        let (read, context) = context.split_at(self.only_read.min(context.len()));
        let prompt = Prompt::default().plain_ids(read).context_ids(context);
        prompt.plain_ids(last).plain_ids(&self.second)
    }

    /// The control that reads the first half twice, as one text.
    pub fn repeated(&self) -> Prompt {
        let again: Vec<u32> = self.first.iter().copied().skip(usize::from(self.begins)).collect();
        Prompt::default().plain_ids(&self.first).plain_ids(&again).plain_ids(&self.second)
    }
}

/// The loss of each passage's second half, in nats per token; `progress` is told of every passage.
pub fn losses(
    model: &HybridModel,
    passages: &[Passage],
    prompt: impl Fn(&Passage) -> Prompt,
    thinking: &Thinking,
    progress: impl Fn(),
) -> Result<Vec<f64>> {
    let config = GenerationConfig::default().prompt_logprobs(true).max_tokens(0);
    let config = config.thinking(thinking.clone());
    let loss = |passage: &Passage| {
        let answer = model.generate(prompt(passage), &config)?;
        progress();
        let logprobs = answer.prompt_logprobs.unwrap_or_default();
        let second = logprobs.iter().rev().take(passage.second.len()).flatten();
        Ok(-second.map(|&logprob| f64::from(logprob)).sum::<f64>() / passage.second.len() as f64)
    };
    passages.iter().map(loss).collect()
}

/// A mean over passages and its standard error.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Estimate {
    pub mean: f64,
    pub standard_error: f64,
}

impl Estimate {
    pub fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Self { mean, standard_error: (squares / (count - 1.0) / count).sqrt() }
    }

    /// How much higher `values` are than `base`, passage by passage.
    pub fn of_difference(values: &[f64], base: &[f64]) -> Self {
        let differences: Vec<f64> = values.iter().zip(base).map(|(a, b)| a - b).collect();
        Self::of(&differences)
    }

    /// A difference: `+0.031 ± 0.004`
    pub fn signed(self) -> String {
        format!("{:+.3} ± {:.3}", self.mean, self.standard_error)
    }
}
