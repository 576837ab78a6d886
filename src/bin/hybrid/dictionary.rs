//! `hybrid dictionary`: entries that are read once, each by itself, for models that were trained to read them.

use std::ops::Range;
use std::path::PathBuf;

use candle_core::DType;
use clap::{Args, Subcommand, ValueEnum};
use hybrid_attention::Sight;
use hybrid_attention::dictionary::{Dictionary, DictionaryConfig, Entries, Pooled};

use crate::options::{ModelArgs, Pool, parse_span};
use crate::terminal::{self, Result};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Read the entries of a file, each by itself, and keep what the layers of a model make of them
    Compile(CompileOptions),
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Dictionary")]
struct CompileOptions {
    /// A UTF-8 file of entries, one a line: a headword, a tab and its definition
    ///
    /// Empty lines are skipped. Definitions of a headword that occurs again are joined.
    #[arg(long, value_name = "FILE")]
    entries: PathBuf,

    /// The file to write; what an earlier run that was stopped has left in OUT.part is gone on with
    #[arg(long, value_name = "OUT")]
    out: PathBuf,

    /// The layers whose MLPs are to read it [default: the middle half]
    #[arg(long, value_name = "A..B", value_parser = parse_span)]
    layers: Option<Range<usize>>,

    /// Which tokens of an entry make its vector
    #[arg(long, value_enum, default_value_t = Tokens::Entry)]
    tokens: Tokens,

    /// How the vectors of these tokens become one
    #[arg(long, value_enum, default_value_t = Pool::Mean)]
    pooling: Pool,

    /// Let tokens see only what comes before them: better, with --pooling weighted-mean, for weights that were not
    /// trained to see both ways
    #[arg(long)]
    causal: bool,

    /// The text of an entry [default: "- {headword}: {definition}"]
    #[arg(long, value_name = "T", hide_short_help = true)]
    template: Option<String>,

    /// Cut entries to this many tokens [default: one that is longer than the context is an error]
    #[arg(long, value_name = "N")]
    truncate: Option<usize>,

    /// Keep vectors in half the room, each number rounded by at most 2⁻⁸ of it
    #[arg(long)]
    bf16: bool,

    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Tokens {
    /// All from the headword on
    Entry,
    Headword,
}

impl CompileOptions {
    /// For a model of so many layers.
    fn config(&self, layers: usize) -> DictionaryConfig {
        let middle = layers / 4..layers - layers / 4;
        let config = DictionaryConfig::layers(self.layers.clone().unwrap_or(middle))
            .pooled(match self.tokens {
                Tokens::Headword => Pooled::Headword,
                Tokens::Entry => Pooled::Entry,
            })
            .pooling(self.pooling.into())
            .sight(if self.causal { Sight::Causal } else { Sight::Bidirectional })
            .dtype(if self.bf16 { DType::BF16 } else { DType::F32 });
        let config = self.template.iter().fold(config, DictionaryConfig::template);
        self.truncate.into_iter().fold(config, DictionaryConfig::max_tokens)
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    match &options.command {
        Command::Compile(options) => compile(options),
    }
}

fn compile(options: &CompileOptions) -> Result<()> {
    let entries = Entries::from_tsv(&options.entries)?; // before waiting for the weights
    let (model, _) = options.model.load()?;
    let config = options.config(model.config().num_hidden_layers);
    let bar = terminal::bar(entries.len() as u64, "reading [{bar:30}] {pos}/{len} {eta}");
    let progress = |done, _| bar.set_position(done as u64);
    let dictionary = Dictionary::compile_to(&options.out, &model, &entries, &config, progress)?;
    bar.finish_and_clear();
    terminal::say(&format!("{}: {} entries", options.out.display(), dictionary.len()));
    Ok(())
}
