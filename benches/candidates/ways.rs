//! The ways to choose an answer.

use std::time::Instant;

use hybrid_attention::generate::{Candidates, Score};
use hybrid_attention::refine::Noise;
use hybrid_attention::{GenerationConfig, Thinking};

use crate::Result;
use crate::record::{Done, Record};
use crate::replay::{Choice, History};
use crate::tasks::{Item, Task};

/// Candidates of which the worst half is dropped in each round.
const COUNT: usize = 16;

pub(crate) struct Way {
    pub(crate) name: String,
    from: From,
    choice: Option<Choice>,
}

/// What is chosen from.
#[derive(Clone, Copy, PartialEq)]
enum From {
    Greedy,
    /// Drawn at the task's temperature.
    Samples,
    /// Greedy after thoughts that begin with noise, of a deviation that is this share of each vector's length.
    Thoughts(f64),
}

/// All ways of a task.
pub(crate) fn all(task: &Task) -> Vec<Way> {
    let way = |name: String, from, choice| Way { name, from, choice };
    let agreement = Score::Agreement(task.extract);
    let whole = |count, score| Some(Choice { count, halve: None, score });
    let halving = |score| Some(Choice { count: COUNT, halve: Some(task.every), score });
    let scores = [
        ("random", Score::Random),
        ("logprob", Score::MeanLogprob),
        ("sum", Score::SumLogprob),
        ("entropy", Score::Entropy),
        ("certainty", Score::SelfCertainty),
        ("agreement", agreement),
    ];
    let mut ways = vec![
        way("greedy".into(), From::Greedy, None),
        way("one sample".into(), From::Samples, None),
    ];
    // As many tokens, and as many candidates.
    for count in [task.whole, COUNT] {
        let majority = whole(count, agreement);
        ways.push(way(format!("majority of {count}"), From::Samples, majority));
        let likeliest = whole(count, Score::MeanLogprob);
        ways.push(way(format!("best by logprob of {count}"), From::Samples, likeliest));
    }
    for (name, score) in scores {
        ways.push(way(format!("samples, {name}"), From::Samples, halving(score)));
    }
    if task.key.is_some() {
        ways.push(way("samples, key".into(), From::Samples, halving(Score::Key)));
    }
    for &sd in task.noise {
        for (name, score) in scores {
            ways.push(way(format!("thoughts {sd}, {name}"), From::Thoughts(sd), halving(score)));
        }
    }
    ways
}

/// Runs what is not in the record yet of an item: each way by itself and timed, or, where that is not asked for, as few
/// candidates as will do.
pub(crate) fn run(
    task: &Task,
    (index, item): (usize, &Item),
    timed: bool,
    record: &mut Record,
) -> Result<()> {
    let seed = index as u64;
    if timed {
        let greedy = From::Greedy.config(task, seed);
        task.model.generate(item.prompt.clone(), &greedy)?; // the first to run would be timed as it starts up
    }
    let mut history: Option<(From, History)> = None;
    for way in all(task) {
        let known = record.get(&way.name, index);
        if known.is_some_and(|done| !timed || done.seconds.is_some()) {
            continue;
        }
        let done = match way.choice_of_recorded().filter(|_| !timed) {
            None => way.run(task, item, seed)?,
            Some(choice) => {
                if history.as_ref().is_none_or(|(from, _)| *from != way.from) {
                    let all = Choice { count: COUNT, halve: None, score: Score::SelfCertainty };
                    let all = all.of(way.from.candidates(COUNT)).every(1);
                    let config = way.from.config(task, seed).candidates(all);
                    let written = History::record(&task.model, item.prompt.clone(), &config)?;
                    history = Some((way.from, written));
                }
                let (_, history) = history.as_ref().ok_or("nothing was written")?;
                let (text, tokens) = history.replay(choice, task.max_tokens)?;
                Done { figure: item.mark(&text), tokens, seconds: None }
            }
        };
        if let Some(known) = known
            && (known.figure, known.tokens) != (done.figure, done.tokens)
        {
            let name = &way.name;
            return Err(format!("{name}, item {index}: {known:?} and {done:?}").into());
        }
        record.add(&way.name, index, done)?;
    }
    Ok(())
}

impl From {
    fn config(self, task: &Task, seed: u64) -> GenerationConfig {
        let own = if task.thinks { task.thinking.clone() } else { Thinking::none() };
        let config = GenerationConfig::default().max_tokens(task.max_tokens).seed(seed);
        match self {
            Self::Greedy => config.thinking(own),
            Self::Samples => config.thinking(own).temperature(task.temperature),
            Self::Thoughts(sd) => {
                let noise = Noise::relative(sd).keep_norm().seed(seed);
                config.thinking(task.thinking.clone().noise(noise))
            }
        }
    }

    fn candidates(self, count: usize) -> Candidates {
        match self {
            Self::Thoughts(_) => Candidates::thoughts(count),
            Self::Greedy | Self::Samples => Candidates::samples(count),
        }
    }
}

impl Way {
    /// How it chooses, if all that it needs to know is in a record of the candidates. A key reads them.
    fn choice_of_recorded(&self) -> Option<Choice> {
        let one = Choice { count: 1, halve: None, score: Score::Random };
        let one = (self.from == From::Samples).then_some(one);
        self.choice.or(one).filter(|choice| choice.score != Score::Key)
    }

    fn run(&self, task: &Task, item: &Item, seed: u64) -> Result<Done> {
        let start = Instant::now();
        let mut config = self.from.config(task, seed);
        if let Some(choice) = self.choice {
            config = config.candidates(choice.of(self.from.candidates(choice.count)));
        }
        let mut stream = task.model.stream(item.prompt.clone(), &config)?;
        let by_key = self.choice.is_some_and(|choice| choice.score == Score::Key);
        if let Some(key) = task.key.as_ref().filter(|_| by_key) {
            stream = stream.key(key)?;
        }
        let answer = stream.collect_answer()?;
        let seconds = Some(start.elapsed().as_secs_f64());
        let tokens = match answer.candidates.as_slice() {
            [] => answer.ids.len(),
            stubs => stubs.iter().map(|stub| stub.ids.len()).sum(),
        };
        Ok(Done { figure: item.mark(&answer.text), tokens, seconds })
    }
}
