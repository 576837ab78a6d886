//! The ways to choose an answer.

use std::time::Instant;

use hybrid_attention::generate::{Candidates, Score};
use hybrid_attention::refine::Noise;
use hybrid_attention::{GenerationConfig, Thinking};

use crate::Result;
use crate::record::Done;
use crate::tasks::{Item, Task};

/// Candidates of which the worst half is dropped in each round.
const COUNT: usize = 16;

/// Deviations of the noise that thoughts begin with, as shares of each vector's length.
const NOISE: [f64; 2] = [0.1, 0.2];

pub(crate) struct Way {
    pub(crate) name: String,
    config: GenerationConfig,
    /// The deviation of the noise that thoughts begin with.
    noise: Option<f64>,
    by_key: bool,
}

/// All ways of a task.
pub(crate) fn all(task: &Task) -> Vec<Way> {
    let own = if task.thinks { task.thinking.clone() } else { Thinking::none() };
    let plain = GenerationConfig::default().max_tokens(task.max_tokens).thinking(own);
    let drawn = plain.clone().temperature(task.temperature);
    let way =
        |name: &str, config| Way { name: name.to_owned(), config, noise: None, by_key: false };
    let whole = || Candidates::samples(task.whole).keep_all();
    let dropping = |score| Candidates::samples(COUNT).every(task.every).score(score);
    let agreement = Score::Agreement(task.extract);
    let of_whole = |what: &str| format!("{what} of {}", task.whole);
    let scores = [
        ("random", Score::Random),
        ("logprob", Score::MeanLogprob),
        ("sum", Score::SumLogprob),
        ("entropy", Score::Entropy),
        ("certainty", Score::SelfCertainty),
        ("agreement", agreement),
    ];
    let mut ways = vec![
        way("greedy", plain.clone()),
        way("one sample", drawn.clone()),
        way(&of_whole("majority"), drawn.clone().candidates(whole().score(agreement))),
        way(&of_whole("best by logprob"), drawn.clone().candidates(whole())),
    ];
    for (name, score) in scores {
        ways.push(way(&format!("samples, {name}"), drawn.clone().candidates(dropping(score))));
    }
    if task.key.is_some() {
        let config = drawn.candidates(dropping(Score::Key));
        ways.push(Way { by_key: true, ..way("samples, key", config) });
    }
    for sd in NOISE {
        // To think again costs more than to draw again: not by every score.
        let few = |(name, _): &(&str, Score)| ["random", "logprob", "agreement"].contains(name);
        for (name, score) in scores.into_iter().filter(few) {
            let candidates = Candidates::thoughts(COUNT).every(task.every).score(score);
            let config = plain.clone().candidates(candidates);
            ways.push(Way { noise: Some(sd), ..way(&format!("thoughts {sd}, {name}"), config) });
        }
    }
    ways
}

impl Way {
    pub(crate) fn run(&self, task: &Task, item: &Item, seed: u64) -> Result<Done> {
        let start = Instant::now();
        let mut config = self.config.clone().seed(seed);
        if let Some(sd) = self.noise {
            let noise = Noise::relative(sd).keep_norm().seed(seed);
            config = config.thinking(task.thinking.clone().noise(noise));
        }
        let mut stream = task.model.stream(item.prompt.clone(), &config)?;
        if let Some(key) = task.key.as_ref().filter(|_| self.by_key) {
            stream = stream.key(key)?;
        }
        let answer = stream.collect_answer()?;
        let seconds = start.elapsed().as_secs_f64();
        let tokens = match answer.candidates.as_slice() {
            [] => answer.ids.len(),
            stubs => stubs.iter().map(|stub| stub.ids.len()).sum(),
        };
        Ok(Done { figure: item.mark(&answer.text), tokens, seconds })
    }
}
