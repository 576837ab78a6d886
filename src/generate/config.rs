//! How to generate: every setting with its unit, range, default and what zero means.

use serde::{Deserialize, Serialize};

use super::candidates::Candidates;
use super::lookup::PromptLookup;
use crate::error::{Error, Result};
use crate::thought::Thinking;

/// How to generate. The default is greedy, without thinking, at most 128 tokens.
///
/// Values are checked when generation starts; one outside its range is an [`Error::Parameter`] that
/// names it. This is plain data: what happens while an answer is made belongs to the
/// [`TokenStream`](super::TokenStream). Each field has a method that sets it and documents it.
///
/// ```
/// use hybrid_attention::{GenerationConfig, Thinking};
///
/// let config = GenerationConfig::default()
///     .thinking(Thinking::new(2).span(14..18))
///     .temperature(0.7).top_p(0.9).seed(42)
///     .max_tokens(256).stop("\n\n");
/// # let _ = config;
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// How to think about the prompt first; see the method of the same name.
    pub thinking: Option<Thinking>,
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// What logits are divided by before sampling.
    pub temperature: f64,
    /// Among how many of the likeliest tokens to sample; 0 is all.
    pub top_k: usize,
    /// The probability that the tokens to sample among make up together.
    pub top_p: f64,
    /// The least share of the likeliest token's probability.
    pub min_p: f64,
    /// What logits of tokens already in the text are divided by.
    pub repetition_penalty: f64,
    /// What a token's logit loses each time it was generated.
    pub frequency_penalty: f64,
    /// What a token's logit loses once it was generated.
    pub presence_penalty: f64,
    /// The seed of the sampler.
    pub seed: Option<u64>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the answer.
    pub stop_ids: Vec<u32>,
    /// The end-of-sequence tokens, instead of the checkpoint's own.
    pub eos_ids: Option<Vec<u32>>,
    /// How many of the likeliest tokens to give with every token.
    pub top_logprobs: usize,
    /// Whether to give the log-probability of each prompt token.
    pub prompt_logprobs: bool,
    /// Several candidates to choose from; see the method of the same name.
    pub candidates: Option<Candidates>,
    /// How to guess ahead; see the method of the same name.
    pub speculate: Option<PromptLookup>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            thinking: None,
            max_tokens: 128,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: None,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            eos_ids: None,
            top_logprobs: 0,
            prompt_logprobs: false,
            candidates: None,
            speculate: None,
        }
    }
}

impl GenerationConfig {
    /// How to think about the prompt first. Default: as the checkpoint's `hybrid.json` says, and not at
    /// all without one; [`Thinking::none`] turns it off in any case.
    #[must_use]
    pub fn thinking(mut self, thinking: Thinking) -> Self {
        self.thinking = Some(thinking);
        self
    }

    /// The most tokens to generate. Default 128. 0 generates none, which is useful for
    /// [`prompt_logprobs`](Self::prompt_logprobs). The model's context is a separate limit.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = max_tokens;
        self
    }

    /// What the logits are divided by before sampling, at least 0. Default 0: always the likeliest
    /// token (the lowest id among equals).
    #[must_use]
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Samples among the `top_k` likeliest tokens (Fan et al. 2018). Default 0: among all.
    #[must_use]
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.top_k = top_k;
        self
    }

    /// Samples among the fewest of the likeliest tokens that together have at least this probability, in
    /// `(0, 1]` (Holtzman et al. 2020). Default 1: among all.
    #[must_use]
    pub fn top_p(mut self, top_p: f64) -> Self {
        self.top_p = top_p;
        self
    }

    /// Samples among tokens at least this share as likely as the likeliest, in `[0, 1]` (Nguyen et
    /// al. 2024). Default 0: among all.
    #[must_use]
    pub fn min_p(mut self, min_p: f64) -> Self {
        self.min_p = min_p;
        self
    }

    /// Divides positive logits of tokens already in the text, prompt included, by this, and
    /// multiplies negative ones by it; above 0 (Keskar et al. 2019). Default 1: no change.
    #[must_use]
    pub fn repetition_penalty(mut self, penalty: f64) -> Self {
        self.repetition_penalty = penalty;
        self
    }

    /// Subtracts this from a token's logit for each time it was generated, in `[-2, 2]`. Default
    /// 0: no change. The prompt does not count, as in the OpenAI API.
    #[must_use]
    pub fn frequency_penalty(mut self, penalty: f64) -> Self {
        self.frequency_penalty = penalty;
        self
    }

    /// Subtracts this from a token's logit once it was generated, in `[-2, 2]`. Default 0: no
    /// change. The prompt does not count, as in the OpenAI API.
    #[must_use]
    pub fn presence_penalty(mut self, penalty: f64) -> Self {
        self.presence_penalty = penalty;
        self
    }

    /// The seed of the sampler: the same seed draws the same tokens from the same probabilities. (Those
    /// can differ in their last digits between processors.) Default: a new one each time. Greedy
    /// generation needs none.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Ends the answer before this text; may be called several times. Default: none. The spelling
    /// of a control token (`<|im_end|>`), which never shows in a text, ends it at that token.
    #[must_use]
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Ends the answer at this token, as if it were an end-of-sequence token; may be called several
    /// times. Default: none.
    #[must_use]
    pub fn stop_id(mut self, id: u32) -> Self {
        self.stop_ids.push(id);
        self
    }

    /// The end-of-sequence tokens, instead of the checkpoint's own. An empty list lets generation
    /// run on to [`max_tokens`](Self::max_tokens).
    #[must_use]
    pub fn eos_ids(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.eos_ids = Some(ids.into_iter().collect());
        self
    }

    /// Gives with every token the `n` likeliest tokens in its place and their log-probabilities, before
    /// penalties and temperature. Default 0. The token's own log-probability is always given.
    #[must_use]
    pub fn top_logprobs(mut self, n: usize) -> Self {
        self.top_logprobs = n;
        self
    }

    /// Gives the log-probability of each prompt token after those before it. Default off. After thinking
    /// these are not probabilities in the usual sense: the thoughts have seen the token.
    #[must_use]
    pub fn prompt_logprobs(mut self, wanted: bool) -> Self {
        self.prompt_logprobs = wanted;
        self
    }

    /// Writes several candidates side by side, drops the worst, and answers with the one that is left; see
    /// [`Candidates`]. It goes with one prompt at a time, and with thinking that neither thinks again nor has an output
    /// nudge. Default: one answer, without any of this.
    #[must_use]
    pub fn candidates(mut self, candidates: Candidates) -> Self {
        self.candidates = Some(candidates);
        self
    }

    /// Guesses what comes next from what the text says already, and lets the model run over several guesses in one
    /// pass; see [`PromptLookup`]. On the CPU the answer is the same, and it comes sooner where it repeats the prompt or itself.
    ///
    /// Nothing is guessed where a step is more than one token through the model or several answers step together:
    /// with [`rethink_every`](Thinking::rethink_every), an [output nudge](Thinking::output_nudge) or
    /// [candidates](Self::candidates), and in [`HybridModel::generate_many`](crate::HybridModel::generate_many).
    /// [`Answer::speculated`](super::Answer::speculated) is then `None`. Default: one token at a time.
    #[must_use]
    pub fn speculate(mut self, how: PromptLookup) -> Self {
        self.speculate = Some(how);
        self
    }

    /// Whether the likeliest token is taken by its logit alone.
    pub(super) fn takes_likeliest(&self) -> bool {
        let penalties =
            [self.repetition_penalty - 1.0, self.frequency_penalty, self.presence_penalty];
        self.temperature == 0.0 && penalties == [0.0; 3]
    }

    /// Checks every value that does not depend on the model; generation does so by itself.
    ///
    /// # Errors
    /// [`Error::Parameter`] for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        let check = |name, value: f64, ok: bool, expected: &str| match ok && value.is_finite() {
            true => Ok(()),
            false => Err(Error::parameter(name, expected, value)),
        };
        let penalty = -2.0..=2.0;
        let (frequency, presence) = (self.frequency_penalty, self.presence_penalty);
        check("temperature", self.temperature, self.temperature >= 0.0, "at least 0")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "within (0, 1]")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "within [0, 1]")?;
        let repetition = self.repetition_penalty;
        check("repetition_penalty", repetition, repetition > 0.0, "above 0")?;
        check("frequency_penalty", frequency, penalty.contains(&frequency), "within [-2, 2]")?;
        check("presence_penalty", presence, penalty.contains(&presence), "within [-2, 2]")?;
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::parameter("stop", "a text that is not empty", "\"\""));
        }
        self.candidates.as_ref().map_or(Ok(()), |candidates| candidates.validate(self))?;
        self.speculate.as_ref().map_or(Ok(()), PromptLookup::validate)?;
        self.thinking.as_ref().map_or(Ok(()), Thinking::validate)
    }
}
