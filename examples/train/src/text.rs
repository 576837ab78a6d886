//! A text as a task: the first half of a window is thought about, the second is predicted.

use std::collections::HashSet;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use hybrid_attention::evaluate::{Estimate, Passage, losses};
use hybrid_attention::model::Batch;
use hybrid_attention::thought::ThoughtModel;
use hybrid_attention::{HybridModel, Prompt, Thinking};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::base::Base;
use crate::lessons::Lessons;
use crate::settings::Settings;
use crate::task::{Exercise, Task};
use crate::terminal::{self, Result};
use crate::trainee::Trainee;

/// One in this many passages is held out, the last of each group.
pub(crate) const HELD_OUT: usize = 5;

/// How many tokens at the beginning are only read: models park their attention on the first (attention
/// sinks, Xiao et al. 2023), and lose that when it changes.
pub(crate) const ONLY_READ: usize = 1;

/// The fewest passages that leave enough held out for a standard error.
const FEWEST: usize = 2 * HELD_OUT;

pub(crate) struct Text {
    /// Passages to draw windows from, each of at least two halves.
    train: Vec<Vec<u32>>,
    /// Passages that are never trained on, in two halves.
    held_out: Vec<Passage>,
    /// Tokens of each half.
    tokens: usize,
    /// The token that begins a text.
    bos: Option<u32>,
    /// Tells these tokens from those of another text.
    pub(crate) fingerprint: String,
    /// The checkpoint, to compare with.
    model: PathBuf,
}

#[derive(Debug, Serialize)]
pub(crate) struct Examination {
    /// Passages that were trained on.
    trained_on: usize,
    held_out: HeldOut,
}

/// Losses of the second halves of passages that were held out, in nats per token.
#[derive(Debug, Serialize)]
struct HeldOut {
    passages: usize,
    /// Tokens of each half.
    tokens: usize,
    /// The checkpoint as it was.
    plain: Losses,
    /// The same, with the first half read twice.
    repeated: Losses,
    /// What was trained, with no pass, one, two, ...
    trained: Vec<Losses>,
}

#[derive(Debug, Serialize)]
struct Losses {
    #[serde(skip_serializing_if = "Option::is_none")]
    passes: Option<usize>,
    mean: Estimate,
    /// Compared with the checkpoint as it was, passage by passage.
    difference: Estimate,
    losses: Vec<f64>,
}

impl Text {
    /// Reads passages, one a line; those of fewer than two halves of `tokens` are skipped, and so are
    /// repeated ones. Of those held out, the first `examined` are for the examination.
    pub(crate) fn read(path: &Path, base: &Base, tokens: usize, examined: usize) -> Result<Self> {
        if tokens <= ONLY_READ + 1 {
            return Err(format!("--tokens: expected at least {}", ONLY_READ + 2).into());
        }
        let most = base.config.max_position_embeddings / 3;
        if tokens > most {
            let message = "for three times as many, the prompt read twice, have to fit";
            return Err(format!("--tokens: expected at most {most}, {message}").into());
        }
        if examined == 1 {
            return Err("--passages: expected at least 2, or 0 for no examination".into());
        }
        let text = terminal::read_text(path)?;
        let mut seen = HashSet::new();
        let mut passages = Vec::new();
        let bar = terminal::bar(text.len() as u64, "reading [{bar:30}] {percent}%");
        for line in text.lines() {
            bar.inc(line.len() as u64);
            if seen.insert(line.trim()) {
                let ids = base.tokenizer.encode(line.trim(), true)?;
                passages.extend((ids.len() >= 2 * tokens).then_some(ids));
            }
        }
        bar.finish_and_clear();
        if passages.len() < FEWEST {
            let found = passages.len();
            let message = format!(
                "{}: too little text: {found} passages, one a line, have {} tokens (twice --tokens) \
                 or more; at least {FEWEST} have to",
                path.display(),
                2 * tokens
            );
            return Err(message.into());
        }
        let fingerprint = fingerprint(&passages);
        let bos = base.tokenizer.bos_token_id();
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        for (index, ids) in passages.into_iter().enumerate() {
            if index % HELD_OUT + 1 < HELD_OUT {
                train.push(ids);
            } else if held_out.len() < examined {
                let (first, second) = ids[..2 * tokens].split_at(tokens);
                let begins = first.first().copied() == bos;
                let (first, second) = (first.to_vec(), second.to_vec());
                held_out.push(Passage { first, second, begins, only_read: ONLY_READ });
            }
        }
        let model = base.path.clone();
        Ok(Self { train, held_out, tokens, bos, fingerprint, model })
    }

    /// A window of two halves of a passage. It begins as a text does.
    fn window(&self, rng: &mut impl Rng) -> impl Iterator<Item = u32> {
        let ids = &self.train[rng.random_range(0..self.train.len())];
        let length = 2 * self.tokens;
        let start = rng.random_range(0..=ids.len() - length);
        let begins = usize::from(ids.first().copied() == self.bos);
        ids[..begins].iter().chain(&ids[start + begins..start + length]).copied()
    }
}

impl Task for Text {
    type Examination = Examination;

    const STEPS_PER_POINT: usize = 10;

    fn draw(&self, settings: &Settings, _: &Lessons, rng: &mut ChaCha8Rng) -> Result<Exercise> {
        let passes = settings.draw_passes(settings.most_passes(), rng);
        let (half, seq) = (self.tokens, 2 * self.tokens);
        let (mut ids, mut answers) = (Vec::new(), Vec::new());
        let mut batch = Batch::dense(settings.batch, seq)?;
        for sequence in 0..settings.batch {
            let start = ids.len();
            ids.extend(self.window(rng));
            // Each token is predicted where the one before it is read, which is not thought about.
            answers.extend((start + half..start + seq).map(|at| (at as u32 - 1, ids[at])));
            batch = batch.with_context(sequence, std::slice::from_ref(&(ONLY_READ..half - 1)))?;
        }
        Ok(Exercise { ids, batch, answers, passes, end: None })
    }

    fn status(&self, _: &Lessons, loss: f32) -> String {
        format!("loss {loss:.3}")
    }

    fn examine(&self, settings: &Settings, trainee: &Trainee) -> Result<Option<Examination>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let passes = 0..=settings.most_passes();
        let count = (2 + passes.clone().count()) * self.held_out.len();
        let bar = terminal::bar(count as u64, "examination [{bar:30}] {pos}/{len}, {eta} to go");
        let measure = |model: &HybridModel, prompt: fn(&Passage) -> Prompt, thinking: &Thinking| {
            losses(model, &self.held_out, prompt, thinking, || bar.inc(1))
        };
        let ready = |model: ThoughtModel| HybridModel::new(model, None);

        let model = ready(Base::load(&self.model)?.model()?)?;
        let plain = measure(&model, Passage::prompt, &Thinking::none())?;
        let repeated = measure(&model, Passage::repeated, &Thinking::none())?;
        drop(model);
        let model = ready(trainee.model(&mut settings.rng(settings.steps))?)?;
        let of = |passes, losses: Vec<f64>| {
            let difference = Estimate::of_difference(&losses, &plain);
            Losses { passes, mean: Estimate::of(&losses), difference, losses }
        };
        let trained = |passes| -> Result<Losses> {
            Ok(of(Some(passes), measure(&model, Passage::prompt, &settings.thinking(passes))?))
        };
        let held_out = HeldOut {
            passages: self.held_out.len(),
            tokens: self.tokens,
            trained: passes.map(trained).collect::<Result<_>>()?,
            repeated: of(None, repeated),
            plain: of(None, plain.clone()),
        };
        bar.finish_and_clear();
        write!(stdout(), "{}", held_out.table())?;
        Ok(Some(Examination { trained_on: self.train.len(), held_out }))
    }
}

impl HeldOut {
    /// A Markdown table.
    fn table(&self) -> String {
        let Self { passages, tokens, plain, repeated, trained } = self;
        let mut table = format!(
            "{passages} passages held out, {tokens} tokens thought about, {tokens} predicted. \
             Nats per token, ± standard error.\n\n| | loss | less the checkpoint's |\n|---|---|---|\n"
        );
        let trained = trained
            .iter()
            .map(|it| (format!("trained, {} passes", it.passes.unwrap_or_default()), it));
        let controls = [("checkpoint".to_string(), plain), ("prompt twice".to_string(), repeated)];
        for (name, Losses { mean, difference, .. }) in controls.into_iter().chain(trained) {
            let loss = format!("{:.3} ± {:.3}", mean.mean, mean.standard_error);
            table += &format!("| {name} | {loss} | {} |\n", difference.signed());
        }
        table
    }
}

/// FNV-1a (Fowler, Noll & Vo) over all tokens, with an end mark for each passage.
pub(crate) fn fingerprint(passages: &[Vec<u32>]) -> String {
    let ended = passages.iter().flat_map(|ids| ids.iter().copied().chain([u32::MAX]));
    let hash = ended.flat_map(u32::to_le_bytes).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
