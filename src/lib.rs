//! A Mistral that thinks both ways before it speaks.

mod error;
pub mod model;

pub use error::{Error, Result};
