#![doc = include_str!("../README.md")]

pub mod adapter;
mod config;
mod error;
pub mod evaluate;
pub mod generate;
mod hybrid;
mod kernels;
mod layout;
pub mod load;
pub mod model;
mod pooling;
pub mod refine;
pub mod thought;
mod tokenizer;

pub use adapter::Adapter;
pub use config::Config;
pub use error::{Error, Result};
pub use generate::{
    Answer, Conversation, GenerationConfig, Prompt, StopReason, Token, TokenStream,
};
pub use hybrid::{EmbedConfig, HybridModel};
pub use load::WeightType;
pub use model::Mind;
pub use pooling::Pooling;
pub use thought::Thinking;
pub use tokenizer::{DecodeStream, Message, Tokenizer};
