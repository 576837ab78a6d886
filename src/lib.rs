//! A Mistral that thinks both ways before it speaks.

mod config;
mod error;
pub mod load;
pub mod model;
mod tokenizer;

pub use config::Config;
pub use error::{Error, Result};
pub use tokenizer::{DecodeStream, Message, Tokenizer};
