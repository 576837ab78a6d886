//! Teaches models to think, and examines what they have learned.
//!
//! A run ([`train`]) draws the texts of a step from a task, the flashback suite or a text of your own;
//! reads them as the method does, thought passes included ([`read`]); takes a step down the gradient of
//! the answers' cross entropy ([`AdamW`]); and leaves a checkpoint or an adapter, and a record of how it
//! went. [`score`] examines a model on the suite, and [`report`] makes a table and a figure from
//! records.

mod adamw;
mod arms;
mod base;
mod curve;
mod entries;
mod flashback;
mod glossary;
mod lessons;
mod lost_words;
mod names;
mod options;
mod pairs;
mod record;
mod report;
mod score;
mod settings;
mod task;
pub mod terminal;
mod text;
mod tokenizer;
mod trainee;
mod trainer;
mod ways;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use adamw::AdamW;
pub use arms::{Arms, arms, report_arms};
pub use options::Options;
pub use report::report;
pub use score::{Scores, read, score};
pub use trainer::train;
pub use ways::report_ways;
