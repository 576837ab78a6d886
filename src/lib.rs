//! A Mistral that thinks both ways before it speaks.

mod error;
pub mod model;
mod tokenizer;

pub use error::{Error, Result};
pub use tokenizer::{DecodeStream, Message, Tokenizer};
