//! Does thinking about a text help to predict how it continues? Passages are cut in two halves: the
//! first is thought about, the second only read, and the figure is how much the second surprises the
//! model, in nats per token. Figures of the same passages are compared pair by pair.
//!
//! ```
//! use candle_core::Device;
//! use hybrid_attention::evaluate::{Estimate, Passage, losses};
//! use hybrid_attention::{HybridModel, Thinking};
//!
//! let model = HybridModel::tiny(&Device::Cpu)?;
//! let passage = |first: [u32; 4], second: [u32; 2]| Passage {
//!     first: first.to_vec(),
//!     second: second.to_vec(),
//!     begins: false,
//!     only_read: 0,
//! };
//! let passages = [passage([5, 150, 9, 151], [7, 152]), passage([8, 150, 6, 153], [3, 154])];
//!
//! let plain = losses(&model, &passages, Passage::prompt, &Thinking::none(), || ())?;
//! let twice = losses(&model, &passages, Passage::repeated, &Thinking::none(), || ())?; // a control
//! let thought = losses(&model, &passages, Passage::prompt, &Thinking::new(2), || ())?;
//! println!("thinking: {}", Estimate::of_difference(&thought, &plain).signed()); // +0.031 ± 0.004
//! # assert_eq!((plain.len(), twice.len()), (2, 2));
//! # Ok::<_, hybrid_attention::Error>(())
//! ```

use serde::Serialize;

use crate::error::{Error, Result};
use crate::generate::{GenerationConfig, Prompt};
use crate::hybrid::HybridModel;
use crate::thought::Thinking;

/// Two adjacent parts of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// The tokens that are thought about, except the last: what follows is predicted from it.
    pub first: Vec<u32>,
    /// The tokens that are predicted.
    pub second: Vec<u32>,
    /// Whether `first` opens with the token that begins a text.
    pub begins: bool,
    /// How many of the first tokens are only read. Models park their attention on the first token
    /// (attention sinks, Xiao et al. 2023) and lose that when it changes.
    pub only_read: usize,
}

impl Passage {
    /// As if `first` were a prompt and `second` its answer: the prompt's last token is only read.
    #[must_use]
    pub fn prompt(&self) -> Prompt {
        let (context, last) = self.first.split_at(self.first.len().saturating_sub(1));
        let (read, context) = context.split_at(self.only_read.min(context.len()));
        let prompt = Prompt::default().plain_ids(read).context_ids(context);
        prompt.plain_ids(last).plain_ids(&self.second)
    }

    /// The control that reads the first half twice, as one text.
    #[must_use]
    pub fn repeated(&self) -> Prompt {
        let again: Vec<u32> = self.first.iter().copied().skip(usize::from(self.begins)).collect();
        Prompt::default().plain_ids(&self.first).plain_ids(&again).plain_ids(&self.second)
    }
}

/// The loss of each passage's second half, in nats per token; `progress` is called for every passage.
/// `prompt` makes a prompt from a passage: [`Passage::prompt`], or a control.
///
/// # Errors
/// When a second half is empty, and as [`HybridModel::generate`].
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
        let count = passage.second.len();
        if count == 0 {
            return Err(Error::parameter("passage", "tokens to predict", "none"));
        }
        let answer = model.generate(prompt(passage), &config)?;
        progress();
        let logprobs = answer.prompt_logprobs.unwrap_or_default();
        let second = logprobs.iter().rev().take(count).flatten();
        Ok(-second.map(|&logprob| f64::from(logprob)).sum::<f64>() / count as f64)
    };
    passages.iter().map(loss).collect()
}

/// A mean over passages and its standard error; for fewer than two passages there is none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// How far off it probably is.
    pub standard_error: f64,
}

impl Estimate {
    /// The mean of `values`.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Self { mean, standard_error: (squares / (count - 1.0) / count).sqrt() }
    }

    /// How much higher `values` are than `base`, passage by passage.
    #[must_use]
    pub fn of_difference(values: &[f64], base: &[f64]) -> Self {
        let differences: Vec<f64> = values.iter().zip(base).map(|(a, b)| a - b).collect();
        Self::of(&differences)
    }

    /// A difference: `+0.031 ± 0.004`
    #[must_use]
    pub fn signed(self) -> String {
        format!("{:+.3} ± {:.3}", self.mean, self.standard_error)
    }
}
