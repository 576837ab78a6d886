//! Which model, where it runs, and which types it keeps its numbers in.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use hybrid_attention::hub::{Fetched, Pretrained};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::{Adapter, AdapterScope, Compute, HybridModel, WeightType};
use indicatif::HumanBytes;

use super::dictionary::DictionaryArgs;
use crate::terminal::{self, Result};

/// Which model, and where it runs.
#[derive(Args, Debug)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// A folder with safetensors, a .gguf file (of a split one any part), or a name on the Hugging Face hub, as
    /// org/name [default: a toy model]
    ///
    /// A path that exists comes first, then the cache that transformers and `hf download` fill too; with the
    /// feature hub it is downloaded otherwise. A name may go on with @REVISION, and then with /FILE.gguf or, as
    /// for llama.cpp, :Q4_K_M. The toy model comes with the crate and knows the stories of the flashback
    /// suite only.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<PathBuf>,

    /// What weights are kept as; auto keeps each as it is stored, quantised ones in their blocks
    #[arg(long, value_enum, default_value_t = KeptIn::Auto, requires = "model", hide_short_help = true)]
    pub(crate) dtype: KeptIn,

    /// Quantise matrices while loading, to blocks of this GGUF type
    #[arg(long, value_enum, value_name = "TYPE", requires = "model", conflicts_with = "dtype")]
    pub(crate) quantize: Option<Blocks>,

    /// How exactly products are computed on the CPU; fast rounds what many tokens are multiplied with to what the
    /// processor multiplies fastest, where it has something faster than f32 for the weights' type
    #[arg(long, value_enum, default_value_t = ComputeAs::Exact, requires = "model", hide_short_help = true)]
    pub(crate) compute: ComputeAs,

    /// Read the files whole instead of mapping them, as for a network share where one might be cut short
    /// meanwhile; needs memory for them beside the weights
    #[arg(long, requires = "model", hide_short_help = true)]
    pub(crate) no_mmap: bool,

    /// The device to run on; other than cpu needs the feature of that name
    #[arg(long, value_enum, default_value_t = RunOn::Cpu, hide_short_help = true)]
    pub(crate) device: RunOn,

    /// A low-rank adapter as PEFT saves it: a folder with adapter_config.json and
    /// adapter_model.safetensors
    #[arg(long, value_name = "PATH", hide_short_help = true)]
    pub(crate) adapter: Option<PathBuf>,

    /// When the adapter is active
    #[arg(long, value_enum, default_value_t = AdapterFor::Both, requires = "adapter", hide_short_help = true)]
    pub(crate) adapter_for: AdapterFor,

    #[command(flatten)]
    dictionary: DictionaryArgs,
}

/// The note for a run without a checkpoint.
const TOY: &str = "note: without --model this is the toy model that comes with the crate: it knows the \
                   stories of the flashback suite, and nothing else";

/// When an adapter is active, on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum AdapterFor {
    /// In thought passes, and when text is read in both directions
    Thinking,
    /// Whenever text is read causally
    Decoding,
    Both,
}

impl From<AdapterFor> for AdapterScope {
    fn from(scope: AdapterFor) -> Self {
        match scope {
            AdapterFor::Thinking => Self::Thinking,
            AdapterFor::Decoding => Self::Decoding,
            AdapterFor::Both => Self::Both,
        }
    }
}

/// A weight type on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum KeptIn {
    Auto,
    F32,
    Bf16,
    F16,
}

/// Blocks on the command line, by the names that GGUF tools give them.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Blocks {
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

/// How exactly, on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ComputeAs {
    Exact,
    Fast,
}

impl From<ComputeAs> for Compute {
    fn from(compute: ComputeAs) -> Self {
        match compute {
            ComputeAs::Exact => Self::Exact,
            ComputeAs::Fast => Self::Fast,
        }
    }
}

/// A device on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum RunOn {
    Cpu,
    Cuda,
    Metal,
}

impl ModelArgs {
    /// The device's name, for display.
    pub(crate) fn name(&self) -> String {
        let path = self.model.as_ref().map(|path| path.display().to_string());
        path.unwrap_or_else(|| "the crate's own small model".to_string())
    }

    /// Loads the model with a progress bar on standard error. Returns the seconds it took.
    pub(crate) fn load(&self) -> Result<(HybridModel, f64)> {
        let start = Instant::now();
        let weights = self.quantize.map_or_else(|| self.dtype.into(), WeightType::from);
        let device = match self.device {
            RunOn::Cpu => Device::Cpu,
            RunOn::Cuda => Device::new_cuda(0)?,
            RunOn::Metal => Device::new_metal(0)?,
        };
        let checkpoint = match (self.model.as_deref().map(located).transpose()?, self.no_mmap) {
            (None, _) => None,
            (Some(path), true) => Some(Checkpoint::read(path)?),
            (Some(path), false) => Some(Checkpoint::open(path)?),
        };
        // Before the weights, which take longer.
        let adapter =
            self.adapter.as_ref().map(|path| Adapter::from_folder(path, &device)).transpose()?;
        let dictionary = self.dictionary.open(&device)?;
        let mut model = match checkpoint {
            None => {
                terminal::say(TOY);
                HybridModel::tiny(&device)?
            }
            Some(checkpoint) => {
                let bar = terminal::bar(0, "{msg} [{bar:30}] {percent}%");
                let progress = |done, total| {
                    bar.set_length(total);
                    bar.set_message(format!("loading {}", HumanBytes(total)));
                    bar.set_position(done);
                };
                let model = HybridModel::from_checkpoint(&checkpoint, weights, &device, progress)?;
                bar.finish_and_clear();
                model.with_compute(self.compute.into())?
            }
        };
        if let Some(adapter) = adapter {
            model = model.with_adapter(&adapter, self.adapter_for.into())?;
        }
        if let Some(dictionary) = dictionary {
            model = self.dictionary.apply(model, dictionary)?;
        }
        Ok((model, start.elapsed().as_secs_f64()))
    }
}

/// The path of a model that is given by its path or by its name, downloaded with a progress bar if need be.
fn located(model: &Path) -> Result<PathBuf> {
    let Some(name) = model.to_str() else { return Ok(model.to_path_buf()) };
    let bar = terminal::bar(0, "{msg} [{bar:30}] {percent}%");
    let path = Pretrained::new(name).fetch(|Fetched { file, done, total, .. }| {
        bar.set_length(total);
        bar.set_message(format!(
            "downloading {} of {}, {file}",
            HumanBytes(done),
            HumanBytes(total)
        ));
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(path)
}

/// The types of a model's matrices, for display.
pub(crate) fn kept(model: &HybridModel) -> String {
    let kept = model.transformer().weight_bytes().into_iter();
    let kept = kept.map(|(kept, bytes)| format!("{} {kept}", HumanBytes(bytes as u64)));
    kept.collect::<Vec<_>>().join(" + ")
}

/// How a text is remembered.
#[derive(Args, Debug)]
#[command(next_help_heading = "Model")]
pub(crate) struct CacheArgs {
    /// What the keys and values of the text are kept as; bf16 and f16 round them and need half the
    /// memory [default: f32; on other devices than cpu the type of the weights, and no other]
    #[arg(long, value_enum, value_name = "TYPE", hide_short_help = true)]
    pub(crate) kv_cache: Option<CachedIn>,
}

impl CacheArgs {
    /// `model` with such caches.
    pub(crate) fn apply(&self, model: HybridModel) -> Result<HybridModel> {
        Ok(match self.kv_cache {
            Some(dtype) => model.with_cache_dtype(dtype.into())?,
            None => model,
        })
    }
}

/// The type of a cache, on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum CachedIn {
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
