//! Settings of prompt lookup: how far to guess ahead, and after how long a run of known tokens. The guesses themselves are
//! in `guesser`, what becomes of them in `ahead`.

use serde::{Deserialize, Serialize};

use super::lane::Lane;
use crate::error::{Error, Result};

/// Guesses how an answer goes on from what prompt and answer say already, in order to say it sooner: prompt lookup
/// decoding (Saxena 2023; `prompt_lookup_num_tokens` of transformers).
///
/// Where the last tokens of the text occurred before, those that followed them there are the guesses, of the longest
/// such run the latest. The model then runs over the last token and the guesses in one pass, and each token is drawn
/// from the logits in its place, as it is without guesses. As long as that is the token that was guessed, the logits after
/// it are there already; the first other one is kept, and the guesses after it are forgotten. A guess that is certain, as
/// these are, is accepted by speculative sampling (Leviathan et al. 2023; Chen et al. 2023) with just this probability.
///
/// So on the CPU a single answer is the same to the last bit, sampled or not, with its log-probabilities, stops and
/// penalties, and the same seed draws the same tokens. On other devices a pass of several tokens may round differently
/// from one of one, as it does for a prompt. What is left in the cache may be a block longer under a sliding window, so that
/// a conversation that goes on may keep more of it, and round otherwise, than without guesses; and guesses take room
/// of the caches' budget, and are looked up by a [side source](crate::model::SideSource), though they may never be said.
///
/// | the text | what it brings |
/// |---|---|
/// | rewrites, quotes, corrects, or goes on like what it has read: code, tables, answers from documents | several tokens a pass |
/// | says nothing twice | nothing; few guesses are then tried |
///
/// How often guesses were right after a run of each length is learned as the answer goes on, whether they are tried
/// or not, and as many are tried as promise to pay, up to [`tokens`](Self::tokens): on the CPU a pass over several tokens takes
/// longer than a pass over one. [`Answer::speculated`](super::Answer::speculated) says how it went.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::generate::PromptLookup;
/// use hybrid_attention::{GenerationConfig, HybridModel};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let config = GenerationConfig::default().max_tokens(40).eos_ids([]);
/// let prompt = "The coin is in the jar. The jar is in the chest.";
/// let plain = model.generate(prompt, &config)?;
/// let sooner = model.generate(prompt, &config.speculate(PromptLookup::default()))?;
/// assert_eq!((sooner.ids, sooner.logprobs), (plain.ids, plain.logprobs));
/// println!("{:?}", sooner.speculated); // drafted and accepted
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptLookup {
    tokens: usize,
    shortest: usize,
    longest: usize,
}

impl Default for PromptLookup {
    fn default() -> Self {
        Self { tokens: 10, shortest: 2, longest: 8 }
    }
}

impl PromptLookup {
    /// The most guesses of a pass: with the token before them they are as many rows as products are computed of as
    /// they are of one.
    pub const MOST_TOKENS: usize = Lane::MOST - 1;

    /// The longest run that may be asked for.
    pub const MOST_LONGEST: usize = 64;

    /// The most tokens to guess at a time, from 1 to [`MOST_TOKENS`](Self::MOST_TOKENS). Default 10.
    #[must_use]
    pub fn tokens(mut self, tokens: usize) -> Self {
        self.tokens = tokens;
        self
    }

    /// How many tokens at the end of the text must have occurred before, at least 1. Default 2.
    #[must_use]
    pub fn shortest(mut self, tokens: usize) -> Self {
        self.shortest = tokens;
        self
    }

    /// How many tokens are compared, from [`shortest`](Self::shortest) to [`MOST_LONGEST`](Self::MOST_LONGEST): of places
    /// where more than these are the same, the latest counts. Default 8.
    #[must_use]
    pub fn longest(mut self, tokens: usize) -> Self {
        self.longest = tokens;
        self
    }

    pub(super) fn validate(&self) -> Result<()> {
        let check = |name, tokens: usize, least: usize, most: usize| match (least..=most)
            .contains(&tokens)
        {
            true => Ok(()),
            false => Err(Error::parameter(name, format!("{least} to {most}"), tokens)),
        };
        check("speculate: tokens", self.tokens, 1, Self::MOST_TOKENS)?;
        check("speculate: longest", self.longest, 1, Self::MOST_LONGEST)?;
        check("speculate: shortest", self.shortest, 1, self.longest)
    }

    /// The most tokens to guess at a time.
    pub(super) fn most(&self) -> usize {
        self.tokens
    }

    /// The lengths of the runs that are looked for.
    pub(super) fn lengths(&self) -> std::ops::RangeInclusive<usize> {
        self.shortest..=self.longest
    }
}
