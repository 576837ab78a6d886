//! The result of a prompt, token by token and as a whole.

use serde::Serialize;

use super::candidates::Stub;
use super::stop::StopReason;
use crate::thought::Trace;

/// A generated token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text that it completed: what follows everything given before, in whole characters. Empty for
    /// special tokens, and while a character, or what may be a stop string, is still incomplete; the
    /// last token brings whatever is left.
    pub text: String,
    /// Its log-probability under the model, before penalties and temperature.
    pub logprob: f32,
    /// The likeliest tokens in its place with their log-probabilities, likeliest first; as many as
    /// [`top_logprobs`](super::GenerationConfig::top_logprobs) asks for.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// The result of a prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The prompt as the model read it.
    pub prompt_ids: Vec<u32>,
    /// The generated tokens, an end-of-sequence token included.
    pub ids: Vec<u32>,
    /// Their text, as it follows the prompt. Empty without a tokenizer.
    pub text: String,
    /// The log-probability of each generated token, before penalties and temperature.
    pub logprobs: Vec<f32>,
    /// The likeliest tokens in the place of each generated one; see [`Token::top_logprobs`].
    pub top_logprobs: Vec<Vec<(u32, f32)>>,
    /// The log-probability of each prompt token after those before it, `None` for the first, and up to the first
    /// behind the last [document](super::Prompt::document);
    /// `None` altogether unless [`prompt_logprobs`](super::GenerationConfig::prompt_logprobs) asked for them.
    pub prompt_logprobs: Option<Vec<Option<f32>>>,
    /// Why it ended.
    pub stop: StopReason,
    /// What thinking did: one trace for the prompt, and one for each time it was thought about
    /// again; none when there was no thinking.
    pub traces: Vec<Trace>,
    /// What became of each of the [candidates](super::GenerationConfig::candidates), in the order of their numbers; none
    /// where there was only the answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Stub>,
    /// How the guesses fared; `None` where none could be made or wanted, see [guessing ahead](super::GenerationConfig::speculate).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculated: Option<Speculated>,
    /// Where the time went.
    pub seconds: Seconds,
}

impl Answer {
    /// The drift of each pass over the prompt; see [`PassTrace::drift`](crate::thought::PassTrace).
    #[must_use]
    pub fn drift(&self) -> Vec<f64> {
        self.traces.first().map(Trace::drift).unwrap_or_default()
    }
}

/// How many tokens of an answer were guessed before they were said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Speculated {
    /// Guesses that the model has run over.
    pub drafted: usize,
    /// Those of them that it then said itself and went on from: each saved a pass. The last token of an answer needs none.
    pub accepted: usize,
}

/// Where the time of an answer went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// The thought passes, those of re-thinking included.
    pub think: f64,
    /// Everything else before the first token.
    pub prefill: f64,
    /// Everything else after it.
    pub decode: f64,
}
