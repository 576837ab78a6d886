//! A Mistral that thinks both ways before it speaks.

mod config;
mod error;
pub mod load;
pub mod model;

pub use config::Config;
pub use error::{Error, Result};
