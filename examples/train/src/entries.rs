//! Entries of a real dictionary as a task: to say what a headword is short for, or means.

use std::io::{Write, stdout};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{D, Tensor};
use candle_nn::loss::cross_entropy;
use hybrid_attention::dictionary::{Dictionary, DictionaryConfig, Entries, Pooled};
use hybrid_attention::model::{Batch, Sight};
use hybrid_attention::thought::ThoughtModel;
use hybrid_attention::{Pooling, Thinking, Tokenizer};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::base::Base;
use crate::lessons::Lessons;
use crate::score::read;
use crate::settings::{Arm, Sees, Settings};
use crate::task::{Exercise, Task};
use crate::terminal::{self, Result};
use crate::trainee::Trainee;
use crate::ways::{Way, Ways};

/// One in this many entries is held out, by chance.
const HELD_OUT: usize = 5;

/// The seed of what is held out, the same for all runs.
const SPLIT: u64 = 20_261_128;

/// What stands around a headword, before its definition. Each is as often learned as any other; the examination takes the
/// first.
const SENTENCES: [[&str; 2]; 4] = [
    ["In computing, the abbreviation ", " stands for"],
    ["They call it ", ", which is short for"],
    ["What does ", " mean? It means"],
    ["The manual writes ", " for"],
];

/// How the entries of a dictionary are read.
pub(crate) fn config(layers: Range<usize>, sees: Sees) -> DictionaryConfig {
    let config = DictionaryConfig::layers(layers).pooled(Pooled::Entry);
    match sees {
        Sees::BothWays => config,
        // What is read later has seen more of it.
        Sees::Causal => config.sight(Sight::Causal).pooling(Pooling::WeightedMean),
    }
}

/// For each of so many entries another one, by chance.
pub(crate) fn others(entries: usize, rng: &mut impl Rng) -> Result<Vec<u32>> {
    let mut round: Vec<u32> = (0..u32::try_from(entries)?).collect();
    round.shuffle(rng);
    let mut others = round.clone();
    for (one, next) in round.iter().zip(round.iter().cycle().skip(1)) {
        others[*one as usize] = *next;
    }
    Ok(others)
}

pub(crate) struct OfDictionary {
    tokenizer: Tokenizer,
    train: Vec<(String, String)>,
    /// Of the examination.
    held_out: Vec<(String, String)>,
    /// In which each headword has the vectors of another one: the control.
    shuffled: Option<Dictionary>,
    /// To compare with.
    model: PathBuf,
}

#[derive(Debug, Serialize)]
pub(crate) struct Examination {
    learned: usize,
    held_out: usize,
    /// Nats of a token of the definitions of held-out entries, and those whose every token is the likeliest.
    ways: Ways,
}

impl OfDictionary {
    /// What is taught, and whom. A dictionary is compiled into the folder `out`.
    pub(crate) fn begin(
        settings: &Settings,
        base: Base,
        entries: &Entries,
        out: &Path,
        examined: usize,
    ) -> Result<(Self, Trainee)> {
        if settings.arm != Arm::NoPasses {
            return Err("--entries: without passes, for --arm no-passes".into());
        }
        let mut order: Vec<usize> = (0..entries.len()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(SPLIT);
        order.shuffle(&mut rng);
        let (held_out, train) = order.split_at(entries.len() / HELD_OUT);
        if held_out.len() < 2 {
            let message = format!("expected at least {}, got {}", 2 * HELD_OUT, entries.len());
            return Err(format!("--entries: {message}").into());
        }
        let pairs: Vec<(&str, &str)> = entries.iter().collect();
        let own = |index: &usize| (pairs[*index].0.to_string(), pairs[*index].1.to_string());
        let some = |indices: &[usize]| indices.iter().map(own).collect();
        let mut task = Self {
            tokenizer: base.tokenizer.clone(),
            train: some(train),
            held_out: some(&held_out[..examined.min(held_out.len())]),
            shuffled: None,
            model: base.path.clone(),
        };
        let Some(reads) = &settings.dictionary else {
            if settings.adapter.is_none() {
                return Err("--entries: give --dictionary or --rank".into());
            }
            return Ok((task, Trainee::on(base, settings, None)?));
        };
        let config = config(settings.span.0..settings.span.1, reads.sees);
        std::fs::create_dir_all(out).map_err(|error| format!("{}: {error}", out.display()))?;
        let bar = terminal::bar(0, "reading entries [{bar:30}] {pos}/{len} {eta}");
        let progress = |done: usize, all: usize| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        };
        let (file, model) = (out.join("dictionary.safetensors"), base.with_tokenizer()?);
        let dictionary = Dictionary::compile_to(file, &model, entries, &config, progress)?;
        bar.finish_and_clear();
        task.shuffled = Some(dictionary.reordered(&others(entries.len(), &mut rng)?)?);
        Ok((task, Trainee::reading(base, dictionary, settings)?))
    }

    /// The tokens of a sentence up to the definition, and those of the definition.
    fn sentence(
        &self,
        before: &str,
        [left, right]: [&str; 2],
        (headword, definition): &(String, String),
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let prompt = self.tokenizer.encode(&format!("{before}{left}{headword}{right}"), true)?;
        // A token that spans both would not be one of the prompt.
        let answer = self.tokenizer.encode(&format!(" {definition}."), false)?;
        Ok((prompt, answer))
    }

    /// What comes of the held-out entries.
    fn way(
        &self,
        name: &str,
        model: &ThoughtModel,
        defined: bool,
        progress: impl Fn(),
    ) -> Result<Way> {
        let (mut losses, mut right) = (Vec::new(), Vec::new());
        let (mut tokens, start) = (0, Instant::now());
        for entry in &self.held_out {
            let before = match defined {
                true => format!("- {}: {}\n", entry.0, entry.1),
                false => String::new(),
            };
            let (prompt, answer) = self.sentence(&before, SENTENCES[0], entry)?;
            let ids = [prompt.as_slice(), &answer].concat();
            tokens += ids.len();
            let hidden = read(model, &Thinking::none(), &ids, Batch::one(ids.len())?)?;
            // Each token is predicted where the one before it is read.
            let hidden = hidden.narrow(0, prompt.len() - 1, answer.len())?;
            let logits = model.decoder().logits(&hidden)?; // (answer, vocab)
            let said: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
            right.push(f64::from(said == answer));
            let answer = Tensor::new(answer, hidden.device())?;
            losses.push(f64::from(cross_entropy(&logits, &answer)?.to_scalar::<f32>()?));
            progress();
        }
        let count = self.held_out.len() as f64;
        let (tokens, seconds) = (tokens as f64 / count, start.elapsed().as_secs_f64() / count);
        Ok(Way { name: name.to_string(), losses, right, tokens, seconds })
    }
}

impl Task for OfDictionary {
    type Examination = Examination;

    const STEPS_PER_POINT: usize = 10;

    fn draw(&self, settings: &Settings, _: &Lessons, rng: &mut ChaCha8Rng) -> Result<Exercise> {
        let (mut ids, mut answers, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..settings.batch {
            let sentence = SENTENCES[rng.random_range(0..SENTENCES.len())];
            let entry = &self.train[rng.random_range(0..self.train.len())];
            let (prompt, answer) = self.sentence("", sentence, entry)?;
            let start = ids.len() + prompt.len();
            answers.extend((start..).zip(&answer).map(|(at, id)| (at as u32 - 1, *id)));
            lengths.push(prompt.len() + answer.len());
            ids.extend(prompt.into_iter().chain(answer));
        }
        let batch = Batch::ragged(&lengths)?;
        Ok(Exercise { ids, batch, answers, passes: 0, end: None })
    }

    fn status(&self, _: &Lessons, loss: f32) -> String {
        format!("loss {loss:.3}")
    }

    fn examine(&self, settings: &Settings, trainee: &Trainee) -> Result<Option<Examination>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let count = 4 * self.held_out.len() as u64;
        let bar = terminal::bar(count, "examination [{bar:30}] {pos}/{len}, {eta} to go");
        let before = Base::load(&self.model)?.model()?;
        let mut ways = vec![
            self.way("nothing", &before, false, || bar.inc(1))?,
            self.way("the definition in the prompt", &before, true, || bar.inc(1))?,
        ];
        drop(before);
        let trained = trainee.model(&mut settings.rng(settings.steps))?;
        let name = match &settings.dictionary {
            Some(reads) => format!("dictionary, read {}", reads.sees.name()),
            None => "low-rank adapter".to_string(),
        };
        ways.push(self.way(&name, &trained, false, || bar.inc(1))?);
        if let Some(shuffled) = &self.shuffled
            && let Some(model) = trainee.with_dictionary(shuffled)?
        {
            ways.push(self.way(&format!("{name}, shuffled"), &model, false, || bar.inc(1))?);
        }
        bar.finish_and_clear();
        let ways = Ways::new(ways);
        write!(
            stdout(),
            "{}",
            ways.table("Nats per token of the definition, and those right to the letter")
        )?;
        let (learned, held_out) = (self.train.len(), self.held_out.len());
        Ok(Some(Examination { learned, held_out, ways }))
    }
}
