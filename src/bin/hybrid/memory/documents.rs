//! `hybrid memory documents`: what is a document worth that need not be read again, and what does it cost?
//!
//! Seconds: one document of a memory and a question of 16 tokens, up to the first token of the answer, with the
//! document read now and with what reading has left taken from its file.
//!
//! Nats: each text is cut in two, and the second part is predicted behind its own first part among those of other
//! texts, which stands at each place equally often. All are read together causally, or each was read by itself.
//!
//! ```text
//! benches/texts.sh target/texts
//! hybrid memory documents --model PATH --texts target/texts/lee.txt
//! ```

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::time::Instant;
use std::{env, fs, process};

use clap::Args;
use hybrid_attention::evaluate::Estimate;
use hybrid_attention::memory::{Keep, Memory, Note, Recall, Volatile};
use hybrid_attention::thought::Document;
use hybrid_attention::{GenerationConfig, HybridModel, Prompt, Thinking};
use indicatif::ProgressBar;
use serde_json::json;

use crate::files::read_text;
use crate::options::{CacheArgs, ModelArgs, ThinkingArgs};
use crate::terminal::{self, Result};

/// Tokens of the question whose answer is waited for.
const QUESTION: usize = 16;

#[derive(Args, Debug)]
#[command(next_help_heading = "Texts")]
pub(crate) struct Options {
    /// A UTF-8 file of texts, one a line; those that are too short are skipped
    #[arg(long, value_name = "F")]
    texts: PathBuf,

    /// The most texts to take for the nats, from the first on; 0 to measure time alone
    #[arg(long, default_value_t = 40, value_name = "N")]
    passages: usize,

    /// Tokens of each document
    #[arg(long, default_value_t = 96, value_name = "N")]
    tokens: usize,

    /// Tokens that are predicted
    #[arg(long, default_value_t = 64, value_name = "N")]
    predicted: usize,

    /// How many documents stand in front
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 2, 4, 8])]
    documents: Vec<usize>,

    /// How many tokens of each but the first are run again
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [8, 32])]
    recompute: Vec<usize>,

    /// Tokens of the document that is timed; several are timed one after the other
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [128, 512])]
    lengths: Vec<usize>,

    /// How often each is timed; ways take turns
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,

    /// Print JSON objects, one a line, instead of tables
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    options.thinking.warn();
    let texts = read_text(&options.texts)?;
    let (model, _) = options.model.load()?;
    let model = options.cache.apply(model)?;
    let thinking = options.thinking.thinking().unwrap_or_else(|| model.thinking().clone());
    let steps = (options.lengths.len() * options.rounds * 4) as u64;
    let bar = terminal::bar(steps, "timing [{bar:30}] {pos}/{len}, {eta} to go");
    for (index, &length) in options.lengths.iter().enumerate() {
        let timed = Timed::of(&model, &texts, (length, options.rounds), &thinking, &bar)?;
        bar.suspend(|| timed.print(options.json, index == 0))?;
    }
    bar.finish_and_clear();
    if options.passages > 0 {
        Nats { options, model: &model, thinking: &thinking }.print(&texts)?;
    }
    Ok(())
}

/// How a document gets in front of a question.
const WAYS: [&str; 4] =
    ["read causally", "read as it is kept", "kept, first used", "kept, used before"];

/// One document, timed.
struct Timed {
    tokens: usize,
    file_bytes: u64,
    /// For each way, seconds of each round, and seconds of all processors together.
    seconds: [Vec<f64>; 4],
    processors: [f64; 4],
}

impl Timed {
    fn of(
        model: &HybridModel,
        texts: &str,
        (length, rounds): (usize, usize),
        thinking: &Thinking,
        bar: &ProgressBar,
    ) -> Result<Self> {
        let tokenizer = model.tokenizer().ok_or("the checkpoint has no tokenizer")?;
        let ids = tokenizer.encode_said(texts)?;
        let (document, question) = ids.split_at_checked(length).ok_or("too few texts")?;
        let question = question.get(..QUESTION).ok_or("too few texts")?;
        let text = tokenizer.decode(document, true);
        let folder = Folder::new()?;
        let plain = Memory::over(Volatile::default(), model, None)?;
        let memory = plain.clone().keep_in(&folder.0, Keep::Thought(thinking.clone()))?;
        let id = memory.remember(&text, Note::default())?;
        let found = memory.recall(&text, &Recall::best(1))?;
        let recall = Recall::best(1).tokens(usize::MAX);
        let file = folder.0.join(format!("{id}.safetensors"));
        let tokens = memory.document(id)?.ok_or("it is gone")?.ids().len();
        let file_bytes = fs::metadata(file)?.len();

        let (mut seconds, mut processors) = ([const { Vec::new() }; 4], [0.0; 4]);
        for _ in 0..rounds {
            // Without what it has in hand.
            let again = plain.clone().keep_in(&folder.0, None)?;
            let now = [&plain, &plain, &again, &again];
            for (way, memory) in now.into_iter().enumerate() {
                let thinking = if way == 1 { thinking.clone() } else { Thinking::none() };
                let config = GenerationConfig::default().thinking(thinking).max_tokens(1);
                let (start, spent) = (Instant::now(), of_processors());
                let prompt = memory.context_of(&found, &recall)?.plain_ids(question);
                model.generate(prompt, &config)?;
                if let (Some(all), Some(sum)) = (seconds.get_mut(way), processors.get_mut(way)) {
                    all.push(start.elapsed().as_secs_f64());
                    *sum += of_processors() - spent;
                }
                bar.inc(1);
            }
        }
        seconds.iter_mut().for_each(|all| all.sort_by(f64::total_cmp));
        let processors = processors.map(|sum| sum / rounds.max(1) as f64);
        Ok(Self { tokens, file_bytes, seconds, processors })
    }

    fn print(&self, as_json: bool, first: bool) -> Result<()> {
        let mut out = stdout().lock();
        if first && !as_json {
            let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
            writeln!(out, "Load of the machine: {}\n", load.trim())?;
            writeln!(
                out,
                "| tokens | bytes a token | document | s to the first token: least | middle | of processors | times faster than reading it as it is kept |"
            )?;
            writeln!(out, "|---|---|---|---|---|---|---|")?;
        }
        let least = |way: usize| self.seconds.get(way).and_then(|all| all.first()).copied();
        let middle = |all: &[f64]| all.get(all.len() / 2).copied().unwrap_or(f64::NAN);
        let again = least(1).unwrap_or(f64::NAN);
        let a_token = self.file_bytes as f64 / self.tokens as f64;
        for (way, (name, all)) in WAYS.iter().zip(&self.seconds).enumerate() {
            let least = least(way).unwrap_or(f64::NAN);
            let of_processors = self.processors.get(way).copied().unwrap_or(f64::NAN);
            if as_json {
                let line = json!({
                    "tokens": self.tokens, "bytes_a_token": a_token, "document": name,
                    "seconds": all, "seconds_of_processors": of_processors,
                });
                writeln!(out, "{line}")?;
                continue;
            }
            writeln!(
                out,
                "| {} | {a_token:.0} | {name} | {least:.4} | {:.4} | {of_processors:.3} | {:.1} |",
                self.tokens,
                middle(all),
                again / least,
            )?;
        }
        Ok(())
    }
}

/// What the nats are of.
struct Nats<'a> {
    options: &'a Options,
    model: &'a HybridModel,
    thinking: &'a Thinking,
}

impl Nats<'_> {
    fn print(&self, texts: &str) -> Result<()> {
        let Options { tokens, predicted, documents, recompute, passages, .. } = self.options;
        let tokenizer = self.model.tokenizer().ok_or("the checkpoint has no tokenizer")?;
        let begins = tokenizer.encode("", true)?;
        let begins: Vec<u32> =
            begins.into_iter().take_while(|id| Some(*id) == tokenizer.bos_token_id()).collect();
        let end = tokenizer.encode_said("\n\n")?;
        let mut cut = Vec::new();
        for line in texts.lines().filter(|_| *passages > 0) {
            let ids = tokenizer.encode_said(line.trim())?;
            if let (Some(first), Some(second)) =
                (ids.get(..*tokens), ids.get(*tokens..tokens + predicted))
            {
                cut.push(([&begins, first, &end].concat(), second.to_vec()));
            }
            if cut.len() == *passages {
                break;
            }
        }
        let most = documents.iter().copied().max().unwrap_or(0);
        if cut.len() < most.max(2) || *predicted < 2 {
            return Err(
                format!("{} long enough texts: too few for {most} documents", cut.len()).into()
            );
        }
        let mind = self.thinking.on(self.model.thought_model())?;
        let bar = terminal::bar(cut.len() as u64, "predicting [{bar:30}] {pos}/{len}, {eta} to go");
        bar.tick();
        let dtype = self.model.conversation(1)?.cache().dtype();
        let read = |(ids, _): &(Vec<u32>, _)| mind.read_document(ids, begins.len(), dtype);
        let kept = cut.iter().map(read).collect::<hybrid_attention::Result<Vec<Document>>>()?;

        // By the number of documents, and how they are read.
        let mut losses: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
        for (index, (_, second)) in cut.iter().enumerate() {
            let mut add = |key, prompt: Prompt| -> Result<()> {
                losses.entry(key).or_default().push(self.loss(prompt, second)?);
                Ok(())
            };
            add((0, 0), Prompt::default().plain_ids(&begins))?;
            for &count in documents.iter().filter(|count| **count > 0) {
                // Its own stands at place index % count.
                let others = |at: usize| (index + at + cut.len() - index % count) % cut.len();
                let chosen: Vec<&Document> =
                    (0..count).filter_map(|at| kept.get(others(at))).collect();
                add((count, 0), together(&chosen, false))?;
                if !self.thinking.is_none() {
                    add((count, 1), together(&chosen, true))?;
                }
                for (way, &again) in (2..).zip([0].iter().chain(recompute)) {
                    let put =
                        |prompt: Prompt, it: &&Document| prompt.document_recomputed(it, again);
                    add((count, way), chosen.iter().fold(Prompt::default(), put))?;
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        self.table(&losses, cut.len())
    }

    /// What the continuation surprises by, in nats a token: all but its first, of which nothing is known behind a
    /// document that did not run.
    fn loss(&self, prompt: Prompt, second: &[u32]) -> Result<f64> {
        let thinking = self.thinking.clone();
        let config = GenerationConfig::default().thinking(thinking).max_tokens(0);
        let answer =
            self.model.generate(prompt.plain_ids(second), &config.prompt_logprobs(true))?;
        let logprobs = answer.prompt_logprobs.unwrap_or_default();
        let count = second.len().saturating_sub(1);
        let sum: f64 = logprobs.iter().rev().take(count).flatten().map(|it| f64::from(*it)).sum();
        Ok(-sum / count as f64)
    }

    fn table(&self, losses: &BTreeMap<(usize, usize), Vec<f64>>, passages: usize) -> Result<()> {
        let Options { tokens, predicted, recompute, json, .. } = self.options;
        let mut out = stdout().lock();
        if !json {
            writeln!(
                out,
                "\n{passages} texts: {predicted} tokens of each are predicted behind its first {tokens}, which stand \
                 among those of others. Nats a token, ± standard error; differences text by text. Thinking: {}\n",
                serde_json::to_string(self.thinking)?,
            )?;
            writeln!(
                out,
                "| documents | how they are read | nats | less all read causally together |"
            )?;
            writeln!(out, "|---|---|---|---|")?;
        }
        for ((count, way), values) in losses {
            let name = match (count, way) {
                (0, _) => "none".to_owned(),
                (_, 0) => "all together, causally".to_owned(),
                (_, 1) => "all together, thought about".to_owned(),
                (_, 2) => "each by itself, kept".to_owned(),
                _ => {
                    let again = recompute.get(way - 3).copied().unwrap_or(0);
                    format!("kept, the last {again} tokens of each but the first run again")
                }
            };
            let base = losses.get(&(*count, 0)).filter(|_| *way > 0);
            let less = base.map(|base| Estimate::of_difference(values, base));
            let nats = Estimate::of(values);
            if *json {
                let line = json!({
                    "documents": count, "read": name, "nats": nats, "less_together": less,
                    "of_texts": values,
                });
                writeln!(out, "{line}")?;
                continue;
            }
            let less = less.map_or(String::new(), Estimate::signed);
            let Estimate { mean, standard_error } = nats;
            writeln!(out, "| {count} | {name} | {mean:.3} ± {standard_error:.3} | {less} |")?;
        }
        Ok(())
    }
}

/// The tokens of all documents one behind the other, as one text: of context, or plain.
fn together(documents: &[&Document], thinks: bool) -> Prompt {
    let mut prompt = Prompt::default();
    for (index, document) in documents.iter().enumerate() {
        let (lead, own) = document.ids().split_at(document.lead());
        if index == 0 {
            prompt = prompt.plain_ids(lead);
        }
        prompt = if thinks { prompt.context_ids(own) } else { prompt.plain_ids(own) };
    }
    prompt
}

/// A folder of this process, removed when it is done.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = env::temp_dir().join(format!("hybrid-documents-{}", process::id()));
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            terminal::say(&format!("note: {} is left: {error}", self.0.display()));
        }
    }
}

/// Seconds that processors have spent on the threads of this process; 0 where the system does not say.
fn of_processors() -> f64 {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let spent = threads.filter_map(|thread| {
        let spent = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        spent.split(' ').next()?.parse::<f64>().ok()
    });
    spent.sum::<f64>() / 1e9
}
