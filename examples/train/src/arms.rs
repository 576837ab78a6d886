//! Ways to know what a word means, side by side: by nothing, by definitions in the prompt, by a dictionary beside it, by
//! an adapter that has as much to learn; for larger and larger glossaries.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use flashback_suite::{Called, Glossary, Split, TALE_FACTS, TEST_WORDS, Tale, Vocabulary};
use hybrid_attention::Config;
use hybrid_attention::adapter::{Adapter, AdapterScope};
use hybrid_attention::dictionary::DictionaryAdapter;
use hybrid_attention::evaluate::Estimate;
use hybrid_attention::thought::ThoughtModel;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::base::Base;
use crate::entries;
use crate::flashback::check_base;
use crate::glossary::{TEMPLATE, answered, compile, tales};
use crate::settings::Sees;
use crate::terminal::{self, Result};

/// The seed of the glossaries.
const SEED: u64 = 20_261_129;

/// What is compared.
#[derive(Debug, clap::Args)]
pub struct Arms {
    /// The folder of a run of `train --suite glossary --arm no-passes`
    #[arg(long, value_name = "DIR")]
    base: PathBuf,

    /// The folder of a run with --dictionary on it
    #[arg(long, value_name = "DIR")]
    dictionary: PathBuf,

    /// The folder of a run with --rank on it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,

    /// Entries of the glossaries
    #[arg(long, value_delimiter = ',', default_value = "10,100,1000,10000")]
    #[arg(value_parser = clap::value_parser!(u64).range(TALE_FACTS as u64..=TEST_WORDS as u64))]
    sizes: Vec<u64>,

    /// Tales for each glossary
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(2..=100_000))]
    tales: u64,

    /// Where the figures go, as JSON
    #[arg(long, value_name = "F")]
    out: Option<PathBuf>,
}

/// What came of a way with a glossary.
#[derive(Debug, Serialize)]
struct Row {
    entries: usize,
    way: &'static str,
    /// Nothing where the prompt is longer than the model's context.
    right: Option<Estimate>,
    /// Tale by tale less those of the right definitions in the prompt.
    less_defined: Option<Estimate>,
    tokens: usize,
    /// For the prompt of a question, multiplications and additions.
    flops: f64,
    /// For the prompt of a question, as it was measured among others.
    seconds: Option<f64>,
    /// Keys and values of the prompt, and vectors of the dictionary.
    bytes: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    /// Parameters of what reads the dictionary, and of the adapter.
    parameters: [usize; 2],
    /// For each glossary, seconds that its dictionary takes to be compiled.
    compiled: Vec<f64>,
    rows: Vec<Row>,
    without_words: Vec<WithoutWords>,
}

/// Told and asked by names, of which a dictionary says nothing: nats of the right answer.
#[derive(Debug, Serialize)]
struct WithoutWords {
    entries: usize,
    without: Estimate,
    with: Estimate,
    /// Tale by tale.
    difference: Estimate,
}

/// Prints the table.
///
/// # Errors
/// When a folder does not hold what it should.
pub fn arms(arms: &Arms) -> Result<()> {
    let base = Base::load(&arms.base)?;
    let vocabulary = Vocabulary::of_glossary();
    check_base(&base, &vocabulary)?;
    let model = base.with_tokenizer()?;
    let reading =
        DictionaryAdapter::open(arms.dictionary.join(DictionaryAdapter::FILE), &Device::Cpu)?;
    let adapter = Adapter::from_folder(&arms.adapter, &Device::Cpu)?;
    let adapted = model.thought_model().adapted(&adapter, AdapterScope::Both)?;
    let count = usize::try_from(arms.tales)?;
    let layers = 0..model.config().num_hidden_layers;
    let way = |sees| entries::config(layers.clone(), sees).template(TEMPLATE);
    let sees = [Sees::BothWays, Sees::Causal];
    let sees = sees.into_iter().find(|sees| way(*sees) == *reading.config());
    let sees = sees.ok_or("--dictionary: was not trained on the suite, in all layers")?;

    let (mut rows, mut compiled, mut without_words) = (Vec::new(), Vec::new(), Vec::new());
    for &size in &arms.sizes {
        let size = usize::try_from(size)?;
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let glossary = Glossary::draw(Split::Test, size, &mut rng);
        let start = Instant::now();
        let dictionary = compile(&model, &glossary, layers.clone(), sees)?;
        compiled.push(start.elapsed().as_secs_f64());
        let order = entries::others(dictionary.len(), &mut rng)?;
        let beside = |dictionary| {
            model.thought_model().with_dictionary(dictionary, &reading, AdapterScope::Both)
        };
        let (right, wrong) = (beside(&dictionary)?, beside(&dictionary.reordered(&order)?)?);
        let told =
            Told { tales: tales(&glossary, count), glossary: &glossary, vocabulary: &vocabulary };

        let plain = model.thought_model();
        let layers = model.config().num_hidden_layers;
        let vectors = dictionary.len() * layers * model.config().hidden_size * 4;
        let read = reads(&reading);
        let defined = told.run(plain, Called::Words, TALE_FACTS)?;
        let mut row = |way, run: &Run, (more_flops, bytes): (f64, usize)| {
            let right = run.right.as_deref();
            rows.push(Row {
                entries: size,
                way,
                right: right.map(Estimate::of),
                less_defined: right
                    .zip(defined.right.as_deref())
                    .map(|(right, defined)| Estimate::of_difference(right, defined)),
                tokens: run.tokens,
                flops: flops(model.config(), run.tokens) + more_flops * run.tokens as f64,
                seconds: run.seconds,
                bytes: run.tokens * bytes_of_token(model.config()) + bytes,
            });
        };
        row("nothing", &told.run(plain, Called::Words, 0)?, (0.0, 0));
        row("all definitions in the prompt", &told.run(plain, Called::Words, size)?, (0.0, 0));
        row("the right definitions in the prompt", &defined, (0.0, 0));
        row("dictionary", &told.run(&right, Called::Words, 0)?, (read, vectors));
        row("dictionary, shuffled", &told.run(&wrong, Called::Words, 0)?, (read, vectors));
        let low_rank = 2.0 * parameters(adapter.tensors()) as f64;
        row("low-rank adapter", &told.run(&adapted, Called::Words, 0)?, (low_rank, 0));
        let [before, after] = [plain, &right].map(|it| told.run(it, Called::Names, 0));
        let (before, after) = (before?.nats, after?.nats);
        without_words.push(WithoutWords {
            entries: size,
            without: Estimate::of(&before),
            with: Estimate::of(&after),
            difference: Estimate::of_difference(&after, &before),
        });
    }
    let parameters = [parameters(reading.tensors()), parameters(adapter.tensors())];
    let report = Report { parameters, compiled, rows, without_words };
    write!(stdout(), "{}", table(&report, count))?;
    match &arms.out {
        Some(path) => write_json(path, &report),
        None => Ok(()),
    }
}

fn write_json(path: &Path, report: &Report) -> Result<()> {
    terminal::write(path, |out| Ok(serde_json::to_writer_pretty(out, report)?))
}

/// Tales about the words of a glossary.
struct Told<'a> {
    tales: Vec<(Tale, usize)>,
    glossary: &'a Glossary,
    vocabulary: &'a Vocabulary,
}

/// What came of all tales.
struct Run {
    /// Nothing where the prompt does not fit.
    right: Option<Vec<f64>>,
    /// Of the right answers.
    nats: Vec<f64>,
    tokens: usize,
    seconds: Option<f64>,
}

impl Told<'_> {
    /// After so many definitions, those of a tale's words among them, or after none.
    fn run(&self, model: &ThoughtModel, called: Called, definitions: usize) -> Result<Run> {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let mut asked = Vec::with_capacity(self.tales.len());
        for (tale, fact) in &self.tales {
            let given = match definitions {
                0 => Vec::new(),
                count => tale.definitions(self.glossary, count, &mut rng),
            };
            let mut ids = tale.ids(called, &given, self.vocabulary);
            ids.extend(tale.ask_ids(*fact, Called::Names, self.vocabulary));
            let tokens = ids.len();
            if tokens > model.decoder().config().max_position_embeddings {
                return Ok(Run { right: None, nats: Vec::new(), tokens, seconds: None });
            }
            asked.push((ids, tale.answer_id(*fact, self.vocabulary)));
        }
        let start = Instant::now();
        let [right, nats] = answered(model, &asked)?;
        let seconds = start.elapsed().as_secs_f64() / asked.len().max(1) as f64;
        let tokens = asked.first().map_or(0, |(ids, _)| ids.len());
        Ok(Run { right: Some(right), nats, tokens, seconds: Some(seconds) })
    }
}

fn parameters<'t>(tensors: impl Iterator<Item = (String, &'t candle_core::Tensor)>) -> usize {
    tensors.map(|(_, tensor)| tensor.elem_count()).sum()
}

/// Multiplications and additions of the columns that read a dictionary, for a token; rows of no entry are products with
/// zeros, which are computed all the same.
fn reads(reading: &DictionaryAdapter) -> f64 {
    2.0 * parameters(reading.tensors()) as f64
}

/// Of reading a prompt: two for each weight and token, and for each pair of tokens that see each other, queries by keys
/// and weights by values.
fn flops(config: &Config, tokens: usize) -> f64 {
    let in_layers = |(name, _): &(String, Vec<usize>)| name.contains(".layers.");
    let weights: usize =
        config.weights().filter(in_layers).map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let pairs = (tokens * (tokens + 1) / 2) as f64;
    let width = (config.num_attention_heads * config.head_dim) as f64;
    2.0 * weights as f64 * tokens as f64 + 4.0 * pairs * width * config.num_hidden_layers as f64
}

fn bytes_of_token(config: &Config) -> usize {
    2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
}

fn table(report: &Report, tales: usize) -> String {
    let mut table = format!(
        "{tales} tales for each glossary, words of the test split; right answers, mean ± standard error; a guess among \
         the facts: {:.3}. Differences tale by tale.\n\n\
         | entries | what explains the words | right | less the right definitions | tokens | MFLOP | ms | kB |\n\
         |---|---|---|---|---|---|---|---|\n",
        1.0 / TALE_FACTS as f64
    );
    let shown = |it: &Estimate| format!("{:.3} ± {:.3}", it.mean, it.standard_error);
    for row in &report.rows {
        let ms = row.seconds.map_or_else(String::new, |it| format!("{:.2}", it * 1e3));
        table += &format!(
            "| {} | {} | {} | {} | {} | {:.0} | {ms} | {} |\n",
            row.entries,
            row.way,
            row.right.as_ref().map_or_else(|| "does not fit".into(), shown),
            row.less_defined.map_or_else(String::new, Estimate::signed),
            row.tokens,
            row.flops / 1e6,
            row.bytes / 1000
        );
    }
    table += &format!(
        "\nCompiling took {} s. {} parameters read the dictionary, the adapter has {}. Told in names, without any word of \
         the dictionary, nats of the right answer:\n\n| entries | without it | with it | difference |\n|---|---|---|---|\n",
        report.compiled.iter().map(|it| format!("{it:.2}")).collect::<Vec<_>>().join(", "),
        report.parameters[0],
        report.parameters[1],
    );
    for WithoutWords { entries, without, with, difference } in &report.without_words {
        let (without, with) = (shown(without), shown(with));
        table += &format!("| {entries} | {without} | {with} | {} |\n", difference.signed());
    }
    table
}
