#![doc = include_str!("../README.md")]

pub mod adapter;
mod apart;
mod batch;
mod cancel;
mod config;
pub mod dictionary;
mod embed;
mod error;
pub mod evaluate;
mod fingerprint;
pub mod generate;
mod generic;
pub mod hub;
mod hybrid;
mod kernels;
mod likelihood;
pub mod load;
pub mod memory;
pub mod model;
mod pooling;
pub mod refine;
mod replace;
pub mod statistics;
pub mod steps;
pub mod thought;
mod tokenizer;

/// The candle that this crate uses: its `Device`, `DType` and `Tensor` are those of this API.
pub use candle_core;

pub use adapter::{Adapter, AdapterConfig, AdapterScope};
pub use cancel::Cancel;
pub use config::{Config, Experts, QueryScaling, RopeScaling};
pub use embed::{EmbedConfig, Vectors};
pub use error::{Error, Result};
pub use generate::{
    Answer, Answers, Conversation, GenerationConfig, Progress, Prompt, StopReason, Token,
    TokenStream,
};
pub use hybrid::HybridModel;
pub use kernels::{Compute, keep_freed_memory};
pub use load::WeightType;
pub use model::Sight;
pub use pooling::Pooling;
pub use thought::{Detail, Halt, HandOff, Thinking};
pub use tokenizer::{DecodeStream, Message, Tokenizer};
