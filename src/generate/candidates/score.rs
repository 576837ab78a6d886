//! What stubs are judged by.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::stub::Stub;

/// What the best candidate is best by. Every score is better the higher it is; of equal ones the higher mean
/// log-probability is better, then the lower number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Score {
    /// The mean log-probability of its tokens under the model, before penalties and temperature, in nats. It cannot
    /// rise above the sum over the most tokens there may be.
    #[default]
    MeanLogprob,
    /// Their sum, which only falls. It favours short answers.
    SumLogprob,
    /// The mean entropy of the next token, negated: sure ones are better. Bounded as the mean is.
    Entropy,
    /// The mean self-certainty (Kang et al. 2025, arXiv 2502.18581): how far the next token's probabilities are from
    /// uniform.
    SelfCertainty,
    /// The share of the candidates still there that say the same (self-consistency, Wang et al. 2023): a vote over
    /// what is extracted from each. One from which nothing can be extracted has 0.
    Agreement(Extract),
    /// How far its statistics are from those that a [key](crate::TokenStream::key) expects of an answer to this prompt,
    /// in standard errors, negated; minus infinity for fewer than two tokens.
    Key,
    /// A number drawn once for each: the control that any score has to beat.
    Random,
}

/// What an answer comes down to, for a vote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Extract {
    /// All of its words, in lower case.
    #[default]
    Words,
    /// The first word, in lower case.
    FirstWord,
    /// The last number: digits with a sign, commas between thousands and a point, as in `-1,234.50`, which is
    /// the same as `-1234.5`.
    LastNumber,
}

impl Score {
    /// The score of each stub among these, all that are still there.
    ///
    /// ```
    /// # use candle_core::Device;
    /// use hybrid_attention::generate::{Candidates, Score};
    /// use hybrid_attention::{GenerationConfig, HybridModel};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let candidates = Candidates::samples(4).keep_all().score(Score::MeanLogprob);
    /// let config = GenerationConfig::default().temperature(1.0).seed(1).max_tokens(3).candidates(candidates);
    /// let answer = model.generate("The coin is in the jar.", &config)?;
    /// // The same answers, judged by something else.
    /// let stubs: Vec<_> = answer.candidates.iter().collect();
    /// let sums = Score::SumLogprob.of(&stubs);
    /// assert!(sums.iter().all(|sum| *sum <= 0.0));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn of(self, stubs: &[&Stub]) -> Vec<f64> {
        let each = |score: fn(&Stub) -> f64| stubs.iter().map(|stub| score(stub)).collect();
        match self {
            Self::MeanLogprob => each(Stub::mean_logprob),
            Self::SumLogprob => each(Stub::sum_logprob),
            Self::Entropy => each(|stub| -stub.entropy),
            Self::SelfCertainty => each(|stub| stub.certainty),
            Self::Agreement(extract) => agreement(extract, stubs),
            Self::Key => each(|stub| -stub.deviation.unwrap_or(f64::INFINITY)),
            Self::Random => each(|stub| {
                let mut rng = ChaCha8Rng::seed_from_u64(stub.seed);
                rng.set_stream(1); // its tokens are drawn from stream 0
                rng.random()
            }),
        }
    }

    /// What the score of a stub cannot rise above in an answer of at most `max_tokens`, where that is known.
    ///
    /// ```
    /// # use candle_core::Device;
    /// # use hybrid_attention::generate::{Candidates, Score};
    /// # use hybrid_attention::{GenerationConfig, HybridModel};
    /// # fn main() -> hybrid_attention::Result<()> {
    /// # let model = HybridModel::tiny(&Device::Cpu)?;
    /// # let candidates = Candidates::samples(4).keep_all();
    /// # let config = GenerationConfig::default().temperature(1.0).seed(1).max_tokens(3).candidates(candidates);
    /// let stubs = model.generate("The coin is in the jar.", &config)?.candidates;
    /// // A sum falls with each token: no whole answer has more than it has now.
    /// let stub = &stubs[0];
    /// assert_eq!(Score::SumLogprob.bound(stub, 3), Score::SumLogprob.of(&[stub]).pop());
    /// assert_eq!(Score::Random.bound(stub, 3), None);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn bound(self, stub: &Stub, max_tokens: usize) -> Option<f64> {
        let most = max_tokens.max(1) as f64;
        match self {
            Self::SumLogprob => Some(stub.sum_logprob()),
            // What is to come adds 0 at best, and the more there is of it, the better.
            Self::MeanLogprob => Some(stub.sum_logprob() / most),
            Self::Entropy => Some(-stub.entropy * (stub.ids.len() as f64 / most)),
            Self::SelfCertainty | Self::Agreement(_) | Self::Key | Self::Random => None,
        }
    }
}

/// For each, the share of all that say the same.
fn agreement(extract: Extract, stubs: &[&Stub]) -> Vec<f64> {
    let said: Vec<_> = stubs.iter().map(|stub| extract.find(&stub.text)).collect();
    let mut votes = HashMap::<&str, usize>::new();
    said.iter().flatten().for_each(|said| *votes.entry(said).or_default() += 1);
    let share = |said: &Option<String>| {
        let votes = said.as_ref().and_then(|said| votes.get(said.as_str()));
        votes.map_or(0.0, |votes| *votes as f64 / stubs.len() as f64)
    };
    said.iter().map(share).collect()
}

impl Extract {
    /// What it finds in a text.
    ///
    /// ```
    /// use hybrid_attention::generate::Extract;
    ///
    /// let text = "It costs 1,200.50 for 3.";
    /// assert_eq!(Extract::LastNumber.find(text).as_deref(), Some("3"));
    /// assert_eq!(Extract::LastNumber.find("1,200.50").as_deref(), Some("1200.5"));
    /// assert_eq!(Extract::FirstWord.find(text).as_deref(), Some("it"));
    /// assert_eq!(Extract::LastNumber.find("none"), None);
    /// ```
    #[must_use]
    pub fn find(self, text: &str) -> Option<String> {
        let mut words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        match self {
            Self::Words => {
                let words: Vec<String> = words.map(str::to_lowercase).collect();
                (!words.is_empty()).then(|| words.join(" "))
            }
            Self::FirstWord => words.next().map(str::to_lowercase),
            Self::LastNumber => last_number(text),
        }
    }
}

/// The last number of a text, without what does not change it.
fn last_number(text: &str) -> Option<String> {
    let end = text.rfind(|c: char| c.is_ascii_digit())? + 1;
    let part = |c: char| c.is_ascii_digit() || c == ',' || c == '.';
    let upto = text.get(..end)?;
    let digits = upto
        .rfind(|c| !part(c))
        .map_or(0, |at| at + upto[at..].chars().next().map_or(1, char::len_utf8));
    let (before, number) = upto.split_at(digits);
    let number = number.trim_start_matches([',', '.']).replace(',', "");
    // More than one point is a version or a date: its last part.
    let number = match number.matches('.').count() {
        0 | 1 => number.as_str(),
        _ => number.rsplit('.').next().unwrap_or(&number),
    };
    let number = match number.split_once('.') {
        Some((whole, part)) => match part.trim_end_matches('0') {
            "" => whole.to_owned(),
            part => format!("{whole}.{part}"),
        },
        None => number.to_owned(),
    };
    let number = match number.trim_start_matches('0') {
        "" => "0".to_owned(),
        rest if rest.starts_with('.') => format!("0{rest}"),
        rest => rest.to_owned(),
    };
    // A hyphen between words or numbers is no sign.
    let signed =
        before.strip_suffix('-').is_some_and(|rest| !rest.ends_with(char::is_alphanumeric));
    Some(if signed && number != "0" { format!("-{number}") } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_same_however_they_are_written() {
        for (text, expected) in [
            ("4", Some("4")),
            ("is 007.", Some("7")),
            ("$1,234.50 in all", Some("1234.5")),
            ("from 3 to -2", Some("-2")),
            ("pages 3-2", Some("2")),
            ("0.50", Some("0.5")),
            ("-0", Some("0")),
            ("v1.2.30", Some("30")),
            ("é5", Some("5")),
            ("...", None),
            ("", None),
        ] {
            assert_eq!(Extract::LastNumber.find(text).as_deref(), expected, "{text:?}");
        }
    }
}
