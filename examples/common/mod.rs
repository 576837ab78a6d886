//! What the examples share: loading with a progress bar, and errors as a person wants to see them.

#![allow(unreachable_pub, reason = "each example is its own crate")]
#![allow(dead_code, reason = "not every example uses everything")]

pub mod passages;

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write, stderr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use clap::{ArgGroup, Args, ValueEnum};
use hybrid_attention::generate::Progress;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::Mind;
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{Halt, HandOff};
use hybrid_attention::{
    Adapter, GenerationConfig, HybridModel, Message, Prompt, StopReason, Thinking, WeightType,
};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Which model, and where it runs.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A downloaded checkpoint: a folder with safetensors, or a .gguf file [default: the small model
    /// that comes with the crate, which knows the stories of the flashback suite only]
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,

    /// What weights are kept as; auto keeps each as it is stored, quantised ones in their blocks
    #[arg(long, value_enum, default_value_t = KeptIn::Auto, requires = "model")]
    pub dtype: KeptIn,

    /// Quantise matrices while loading, to blocks of this GGUF type
    #[arg(long, value_enum, value_name = "TYPE", requires = "model", conflicts_with = "dtype")]
    pub quantize: Option<Blocks>,

    /// The device to run on; other than cpu needs the feature of that name
    #[arg(long, value_enum, default_value_t = RunOn::Cpu)]
    pub device: RunOn,

    /// A low-rank adapter as PEFT saves it: a folder with adapter_config.json and
    /// adapter_model.safetensors
    #[arg(long, value_name = "PATH")]
    pub adapter: Option<PathBuf>,

    /// When the adapter is active
    #[arg(long, value_enum, default_value_t = AdapterFor::Both, requires = "adapter")]
    pub adapter_for: AdapterFor,
}

/// When an adapter is active, on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AdapterFor {
    /// In thought passes, and when text is read in both directions
    Thinking,
    /// Whenever text is read causally
    Decoding,
    Both,
}

/// A weight type on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KeptIn {
    Auto,
    F32,
    Bf16,
    F16,
}

/// Blocks on the command line, by the names that GGUF tools give them.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Blocks {
    #[value(name = "q8_0")]
    Q80,
    #[value(name = "q6_k")]
    Q6K,
    #[value(name = "q5_k")]
    Q5K,
    #[value(name = "q4_k")]
    Q4K,
    #[value(name = "q3_k")]
    Q3K,
    #[value(name = "q2_k")]
    Q2K,
    #[value(name = "q5_1")]
    Q51,
    #[value(name = "q5_0")]
    Q50,
    #[value(name = "q4_1")]
    Q41,
    #[value(name = "q4_0")]
    Q40,
}

impl From<Blocks> for WeightType {
    fn from(blocks: Blocks) -> Self {
        Self::Quantized(match blocks {
            Blocks::Q80 => GgmlDType::Q8_0,
            Blocks::Q6K => GgmlDType::Q6K,
            Blocks::Q5K => GgmlDType::Q5K,
            Blocks::Q4K => GgmlDType::Q4K,
            Blocks::Q3K => GgmlDType::Q3K,
            Blocks::Q2K => GgmlDType::Q2K,
            Blocks::Q51 => GgmlDType::Q5_1,
            Blocks::Q50 => GgmlDType::Q5_0,
            Blocks::Q41 => GgmlDType::Q4_1,
            Blocks::Q40 => GgmlDType::Q4_0,
        })
    }
}

impl From<KeptIn> for WeightType {
    fn from(dtype: KeptIn) -> Self {
        match dtype {
            KeptIn::Auto => Self::Stored,
            KeptIn::F32 => Self::Dense(DType::F32),
            KeptIn::Bf16 => Self::Dense(DType::BF16),
            KeptIn::F16 => Self::Dense(DType::F16),
        }
    }
}

/// What a text is remembered in.
#[derive(Args, Debug)]
pub struct CacheArgs {
    /// What the keys and values of the text are kept as; bf16 and f16 round them and need half the
    /// memory [default: f32; on other devices than cpu the type of the weights, and no other]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub kv_cache: Option<CachedIn>,
}

impl CacheArgs {
    /// `model` with such caches.
    pub fn apply(&self, model: HybridModel) -> Result<HybridModel> {
        Ok(match self.kv_cache {
            Some(dtype) => model.with_cache_dtype(dtype.into())?,
            None => model,
        })
    }
}

/// What a cache holds, on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CachedIn {
    F32,
    Bf16,
    F16,
}

impl From<CachedIn> for DType {
    fn from(dtype: CachedIn) -> Self {
        match dtype {
            CachedIn::F32 => Self::F32,
            CachedIn::Bf16 => Self::BF16,
            CachedIn::F16 => Self::F16,
        }
    }
}

/// A device on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RunOn {
    Cpu,
    Cuda,
    Metal,
}

impl ModelArgs {
    /// What it is, for a person.
    pub fn name(&self) -> String {
        let path = self.model.as_ref().map(|path| path.display().to_string());
        path.unwrap_or_else(|| "the crate's own small model".to_string())
    }

    /// Loads the model with a progress bar on standard error. Gives the seconds it took.
    pub fn load(&self) -> Result<(HybridModel, f64)> {
        let start = Instant::now();
        let weights = self.quantize.map_or_else(|| self.dtype.into(), WeightType::from);
        let device = match self.device {
            RunOn::Cpu => Device::Cpu,
            RunOn::Cuda => Device::new_cuda(0)?,
            RunOn::Metal => Device::new_metal(0)?,
        };
        let checkpoint = self.model.as_ref().map(Checkpoint::open).transpose()?;
        // Before the weights, which take longer.
        let adapter =
            self.adapter.as_ref().map(|path| Adapter::from_folder(path, &device)).transpose()?;
        let mut model = match checkpoint {
            None => HybridModel::tiny(&device)?,
            Some(checkpoint) => {
                let bar = bar(0, "{msg} [{bar:30}] {percent}%");
                let progress = |done, total| {
                    bar.set_length(total);
                    bar.set_message(format!("loading {}", HumanBytes(total)));
                    bar.set_position(done);
                };
                let model = HybridModel::from_checkpoint(&checkpoint, weights, &device, progress)?;
                bar.finish_and_clear();
                model
            }
        };
        if let Some(adapter) = adapter {
            let mind = match self.adapter_for {
                AdapterFor::Thinking => Mind::Thinking,
                AdapterFor::Decoding => Mind::Decoding,
                AdapterFor::Both => Mind::Both,
            };
            model = model.with_adapter(&adapter, mind)?;
        }
        Ok((model, start.elapsed().as_secs_f64()))
    }
}

/// What a model's matrices are kept as, for a person.
pub fn kept(model: &HybridModel) -> String {
    let kept = model.transformer().weight_bytes().into_iter();
    let kept = kept.map(|(kept, bytes)| format!("{} {kept}", HumanBytes(bytes as u64)));
    kept.collect::<Vec<_>>().join(" + ")
}

/// One prompt: text, a file of text, or token ids.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("input").required(true).args(["prompt", "prompt_file", "ids"])))]
pub struct PromptArgs {
    /// The prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,

    /// A UTF-8 file that holds the prompt, taken as it is
    #[arg(long, value_name = "F")]
    pub prompt_file: Option<PathBuf>,

    /// The prompt as token ids; needs no tokenizer
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', value_parser = parse_id)]
    #[arg(conflicts_with = "chat")]
    pub ids: Option<Vec<u32>>,

    /// Put the prompt into the model's chat template, as a user's message
    #[arg(long)]
    pub chat: bool,

    /// A system message in front of it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
}

impl PromptArgs {
    /// The prompt, all of it thought about if there is thinking.
    pub fn prompt(&self) -> Result<Prompt> {
        if let Some(ids) = &self.ids {
            return Ok(ids.clone().into());
        }
        let text = self.text()?;
        if !self.chat {
            return Ok(text.into());
        }
        let system = self.system.iter().map(Message::system);
        let messages: Vec<Message> = system.chain([Message::user(text)]).collect();
        Ok(Prompt::chat(&messages))
    }

    /// What was given as text.
    pub fn text(&self) -> Result<String> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Ok(text.clone()),
            (_, Some(path)) => read_text(path),
            _ => Err("no prompt: give --prompt, --prompt-file or --ids".into()),
        }
    }
}

/// How to think; by default as the checkpoint says, which for most is not at all.
#[derive(Args, Debug)]
pub struct ThinkingArgs {
    /// Bidirectional thought passes over the prompt; 0 is a plain Mistral [default: for answers as
    /// the checkpoint's hybrid.json says, else 0]
    #[arg(long, value_name = "N")]
    pub passes: Option<usize>,

    /// The layers that a thought pass runs [default: all]
    #[arg(long, value_name = "A..B", value_parser = parse_span)]
    pub span: Option<Range<usize>>,

    /// Share of the new state in z += w (h - z), in [0, 1] [default: one over the passes, or the
    /// checkpoint's own gate]
    #[arg(long, value_name = "W")]
    pub weight: Option<f64>,

    /// Stop thinking after a pass that moves the thoughts by less than this share of their length;
    /// 0.03 is a good exit [default: never]
    #[arg(long, value_name = "D")]
    pub halt_drift: Option<f64>,

    /// How the decoder receives the thoughts: refined, key-value, or mixed:W with the share W of
    /// their keys and values [default: refined]
    #[arg(long, value_name = "H", value_parser = parse_hand_off)]
    pub hand_off: Option<HandOff>,

    /// Think again over prompt and answer after every N new tokens; of no use where there is no
    /// answer [default: never]
    #[arg(long, value_name = "N")]
    pub rethink_every: Option<usize>,
}

impl ThinkingArgs {
    /// What was asked for, if anything was.
    pub fn thinking(&self) -> Option<Thinking> {
        let mut thinking = Thinking::passes(self.passes?);
        thinking = thinking.rethink_every(self.rethink_every.unwrap_or(0));
        let weight = self.weight.map(Interpolate::new);
        thinking = weight.into_iter().fold(thinking, Thinking::refine);
        thinking = self.span.iter().cloned().fold(thinking, Thinking::span);
        thinking = self.halt_drift.map(Halt::Drift).into_iter().fold(thinking, Thinking::halt);
        Some(self.hand_off.into_iter().fold(thinking, Thinking::hand_off))
    }

    /// `config` with what was given on the command line.
    pub fn apply(&self, config: GenerationConfig) -> GenerationConfig {
        self.thinking().into_iter().fold(config, GenerationConfig::thinking)
    }

    /// Says so where options do nothing.
    pub fn warn(&self) {
        let options = [
            ("--span", self.span.is_some()),
            ("--weight", self.weight.is_some()),
            ("--halt-drift", self.halt_drift.is_some()),
            ("--hand-off", self.hand_off.is_some()),
            ("--rethink-every", self.rethink_every.is_some()),
        ];
        for (option, _) in
            options.iter().filter(|(_, given)| *given && self.passes.unwrap_or(0) == 0)
        {
            say(&format!("note: {option} does nothing without --passes"));
        }
    }
}

/// How to choose tokens; by default as the checkpoint says, else greedily.
#[derive(Args, Debug)]
pub struct SamplingArgs {
    /// Divides the logits before sampling; 0 takes the likeliest token [default: the model's own, else 0]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,

    /// Sample among the K likeliest tokens; 0 among all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,

    /// Sample among the likeliest tokens that together hold this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,

    /// Sample among tokens at least this share as likely as the likeliest
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,

    /// Make tokens already in the text less likely; 1 changes nothing
    #[arg(long, value_name = "R")]
    pub repetition_penalty: Option<f64>,

    /// The seed of the sampler [default: a new one each time]
    #[arg(long)]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// `config` with what was given on the command line.
    pub fn apply(&self, mut config: GenerationConfig) -> GenerationConfig {
        config = self.temperature.into_iter().fold(config, GenerationConfig::temperature);
        config = self.top_k.into_iter().fold(config, GenerationConfig::top_k);
        config = self.top_p.into_iter().fold(config, GenerationConfig::top_p);
        config = self.min_p.into_iter().fold(config, GenerationConfig::min_p);
        config =
            self.repetition_penalty.into_iter().fold(config, GenerationConfig::repetition_penalty);
        self.seed.into_iter().fold(config, GenerationConfig::seed)
    }
}

/// A token id, with or without blanks around it.
fn parse_id(text: &str) -> std::result::Result<u32, String> {
    text.trim().parse().map_err(|_| "expected token ids like 1,2,3".to_string())
}

/// `14..18`
pub fn parse_span(text: &str) -> std::result::Result<Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    ends.map(|(a, b)| a..b).ok_or_else(|| "expected two layer numbers like 14..18".to_string())
}

/// `refined`, `key-value` or `mixed:0.5`
fn parse_hand_off(text: &str) -> std::result::Result<HandOff, String> {
    match (text, text.strip_prefix("mixed:").map(str::parse)) {
        ("refined", _) => Ok(HandOff::Refined),
        ("key-value", _) => Ok(HandOff::KeyValue),
        (_, Some(Ok(weight))) => Ok(HandOff::Mixed { weight }),
        _ => Err("expected refined, key-value or mixed:W with a share W, as in mixed:0.5".into()),
    }
}

/// The content of a text file, which must be UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        format!("{}: not UTF-8 at byte {at}", path.display())
    })?;
    Ok(text)
}

/// Whether a file could stand there: worth knowing before the work on its content.
pub fn check_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder.is_none_or(Path::is_dir) {
        true => Ok(()),
        false => Err(format!("{}: its folder does not exist", path.display()).into()),
    }
}

/// Writes a file, and says so.
pub fn write(path: &Path, content: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let with_path = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut file = BufWriter::new(File::create(path).map_err(with_path)?);
    content(&mut file)?;
    file.flush().map_err(with_path)?;
    say(&format!("[wrote {}]", path.display()));
    Ok(())
}

/// A line on standard error, as far as anybody listens. What is in it may come from a file, so
/// control characters are spelled out.
pub fn say(line: &str) {
    let plain: String = line.chars().flat_map(plain).collect();
    let _ = writeln!(stderr(), "{plain}");
}

/// Why an answer ended, for a person.
pub fn stopped_by(stop: Option<StopReason>) -> &'static str {
    match stop {
        Some(StopReason::Eos) => "the model",
        Some(StopReason::StopId | StopReason::StopString) => "a stop text",
        Some(StopReason::MaxTokens) => "--max-tokens",
        Some(StopReason::Context) => "the end of its context",
        _ => "an error",
    }
}

/// A character as it may be shown on a terminal.
pub fn plain(c: char) -> impl Iterator<Item = char> {
    let spelled = c.is_control().then(|| c.escape_default());
    let itself = spelled.is_none().then_some(c);
    spelled.into_iter().flatten().chain(itself)
}

/// A bar on standard error; silent when that is not a terminal. It shows with its first update.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

/// A sign of life on standard error while there is nothing to count.
pub fn spinner(message: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// A bar for the work before the first token, and what keeps it up to date.
pub fn reading_bar() -> (ProgressBar, impl Fn(Progress) + Send + Sync + 'static) {
    let bar = bar(0, "{msg} [{bar:30}] {pos}/{len}");
    let shown = bar.clone();
    let update = move |progress| {
        let (message, done, total) = match progress {
            Progress::Think { done, total } => ("thinking", done, total),
            Progress::Prefill { done, total } => ("reading", done, total),
            _ => return,
        };
        shown.set_length(total as u64);
        shown.set_message(message);
        shown.set_position(done as u64);
    };
    (bar, update)
}

/// Runs an example's body; an error goes to standard error with all its causes, and the process
/// fails.
pub fn main(body: impl FnOnce() -> Result<()>) -> ExitCode {
    let closed = |error: &std::io::Error| error.kind() == ErrorKind::BrokenPipe;
    match body() {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody reads on: `generate … | head`.
        Err(error) if error.downcast_ref().is_some_and(closed) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                let more = error.to_string();
                if !text.contains(&more) {
                    text = format!("{text}: {more}");
                }
                cause = error.source();
            }
            say(&format!("error: {text}"));
            ExitCode::FAILURE
        }
    }
}
