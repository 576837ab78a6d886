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
use serde::{Deserialize, Serialize};

use crate::base::Base;
use crate::entries;
use crate::flashback::check_base;
use crate::glossary::{TEMPLATE, answered, compile, tales};
use crate::settings::Sees;
use crate::terminal::{self, Result};
use crate::ways::{less, over_runs, shown};

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
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    entries: usize,
    way: String,
    /// For each tale told in words and asked about by a name 1 or 0; nothing where the prompt is longer than the model's
    /// context.
    told: Option<Vec<f64>>,
    /// The same told in names, and asked about by a word.
    asked: Option<Vec<f64>>,
    tokens: usize,
    /// For the prompt of a question, multiplications and additions.
    flops: f64,
    /// For the prompt of a question, as it was measured among others.
    seconds: Option<f64>,
    /// Keys and values of the prompt, and vectors of the dictionary.
    bytes: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Report {
    /// Tales for each glossary.
    tales: usize,
    /// Parameters of what reads the dictionary, and of the adapter.
    parameters: [usize; 2],
    /// For each glossary, seconds that its dictionary takes to be compiled.
    compiled: Vec<f64>,
    rows: Vec<Row>,
    without_words: Vec<WithoutWords>,
}

/// Told and asked by names, of which a dictionary says nothing: for each tale the nats of the right answer.
#[derive(Debug, Serialize, Deserialize)]
struct WithoutWords {
    entries: usize,
    without: Vec<f64>,
    with: Vec<f64>,
}

/// The way that the others are compared with.
const DEFINED: &str = "the right definitions in the prompt";

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
        let config = model.config();
        let vectors = dictionary.len() * config.num_hidden_layers * config.hidden_size * 4;
        let read = reads(&reading);
        let mut row =
            |way: &str, model, definitions, (more_flops, bytes): (f64, usize)| -> Result<()> {
                let run = told.run(model, [Called::Words, Called::Names], definitions)?;
                let asked = told.run(model, [Called::Names, Called::Words], definitions)?;
                rows.push(Row {
                    entries: size,
                    way: String::from(way),
                    told: run.right,
                    asked: asked.right,
                    tokens: run.tokens,
                    flops: flops(config, run.tokens) + more_flops * run.tokens as f64,
                    seconds: run.seconds,
                    bytes: run.tokens * bytes_of_token(config) + bytes,
                });
                Ok(())
            };
        row("nothing", plain, 0, (0.0, 0))?;
        row("all definitions in the prompt", plain, size, (0.0, 0))?;
        row(DEFINED, plain, TALE_FACTS, (0.0, 0))?;
        row("dictionary", &right, 0, (read, vectors))?;
        row("dictionary, shuffled", &wrong, 0, (read, vectors))?;
        let low_rank = 2.0 * parameters(adapter.tensors()) as f64;
        row("low-rank adapter", &adapted, 0, (low_rank, 0))?;
        let [before, after] = [plain, &right].map(|it| told.run(it, [Called::Names; 2], 0));
        let (without, with) = (before?.nats, after?.nats);
        without_words.push(WithoutWords { entries: size, without, with });
    }
    let parameters = [parameters(reading.tensors()), parameters(adapter.tensors())];
    let report = Report { tales: count, parameters, compiled, rows, without_words };
    write!(stdout(), "{}", table(std::slice::from_ref(&report)))?;
    let Some(path) = &arms.out else { return Ok(()) };
    terminal::write(path, |out| Ok(serde_json::to_writer(out, &report)?))
}

/// Prints the table of several such comparisons, of runs with other seeds.
///
/// # Errors
/// When there are none in the folder, or one cannot be read.
pub fn report_arms(runs: &Path) -> Result<()> {
    let reports = terminal::records(runs)?;
    let reports =
        reports.iter().map(|path| terminal::read_record(path)).collect::<Result<Vec<_>>>()?;
    write!(stdout(), "{}", table(&reports))?;
    Ok(())
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
    /// Tales told and asked about in words or names, after so many definitions, those of a tale's words among them, or
    /// after none.
    fn run(
        &self,
        model: &ThoughtModel,
        [told, asked]: [Called; 2],
        definitions: usize,
    ) -> Result<Run> {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let mut prompts = Vec::with_capacity(self.tales.len());
        for (tale, fact) in &self.tales {
            let given = match definitions {
                0 => Vec::new(),
                count => tale.definitions(self.glossary, count, &mut rng),
            };
            let mut ids = tale.ids(told, &given, self.vocabulary);
            ids.extend(tale.ask_ids(*fact, asked, self.vocabulary));
            let tokens = ids.len();
            if tokens > model.decoder().config().max_position_embeddings {
                return Ok(Run { right: None, nats: Vec::new(), tokens, seconds: None });
            }
            prompts.push((ids, tale.answer_id(*fact, self.vocabulary)));
        }
        let start = Instant::now();
        let [right, nats] = answered(model, &prompts)?;
        let seconds = start.elapsed().as_secs_f64() / prompts.len().max(1) as f64;
        let tokens = prompts.first().map_or(0, |(ids, _)| ids.len());
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

/// The figures of all runs, which `of` gives tale by tale; nothing where one has none.
fn figures(reports: &[Report], of: impl Fn(&Report) -> Option<Vec<f64>>) -> Option<Estimate> {
    Some(over_runs(&reports.iter().map(of).collect::<Option<Vec<_>>>()?))
}

fn table(reports: &[Report]) -> String {
    let Some(first) = reports.first() else { return String::new() };
    let spread = if reports.len() > 1 { "deviation over the runs" } else { "error" };
    let mut table = format!(
        "{} tales for each glossary, words of the test split; runs: {}. Right answers, mean ± standard {spread}; a guess \
         among the facts: {:.3}. Differences tale by tale.\n\n\
         | entries | what explains the words | words in the tale | less the right definitions | a word in the question | \
         less the right definitions | tokens | MFLOP | ms | kB |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        first.tales,
        reports.len(),
        1.0 / TALE_FACTS as f64
    );
    for Row { entries, way, tokens, flops, bytes, .. } in &first.rows {
        let find = |report: &Report, way: &str| -> Option<Row> {
            report.rows.iter().find(|row| row.entries == *entries && row.way == way).cloned()
        };
        let cells = [|row: &Row| row.told.clone(), |row: &Row| row.asked.clone()].map(|of| {
            let right = figures(reports, |report| of(&find(report, way)?));
            let difference = figures(reports, |report| {
                Some(less(&of(&find(report, way)?)?, &of(&find(report, DEFINED)?)?))
            });
            let right = right.map_or_else(|| "does not fit".into(), |it| shown(&it));
            format!("{right} | {}", difference.map_or_else(String::new, Estimate::signed))
        });
        let ms = figures(reports, |report| Some(vec![find(report, way)?.seconds? * 1e3]));
        table += &format!(
            "| {entries} | {way} | {} | {tokens} | {:.0} | {} | {} |\n",
            cells.join(" | "),
            flops / 1e6,
            ms.map_or_else(String::new, |it| format!("{:.2}", it.mean)),
            bytes / 1000
        );
    }
    table += &format!(
        "\nCompiling took {} s. {} parameters read the dictionary, the adapter has {}. Told in names, without any word of \
         the dictionary, nats of the right answer:\n\n| entries | without it | with it | difference |\n|---|---|---|---|\n",
        first.compiled.iter().map(|it| format!("{it:.2}")).collect::<Vec<_>>().join(", "),
        first.parameters[0],
        first.parameters[1],
    );
    for WithoutWords { entries, .. } in &first.without_words {
        let of = |values: fn(&WithoutWords) -> Vec<f64>| {
            figures(reports, |report| {
                report.without_words.iter().find(|it| it.entries == *entries).map(values)
            })
        };
        let cells = [
            of(|it| it.without.clone()).map(|it| shown(&it)),
            of(|it| it.with.clone()).map(|it| shown(&it)),
            of(|it| less(&it.with, &it.without)).map(Estimate::signed),
        ];
        let cells = cells.map(Option::unwrap_or_default);
        table += &format!("| {entries} | {} |\n", cells.join(" | "));
    }
    table
}
