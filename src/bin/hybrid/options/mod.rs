//! Options that several subcommands have.

mod candidates;
mod dictionary;
mod embedding;
mod model;
mod prompt;
mod sampling;
mod speculation;
mod thinking;

pub(crate) use candidates::CandidateArgs;
pub(crate) use embedding::{EmbedArgs, Pool};
pub(crate) use model::{CacheArgs, ModelArgs, kept};
pub(crate) use prompt::{PromptArgs, ThoughtPromptArgs, with_chat_template};
pub(crate) use sampling::SamplingArgs;
pub(crate) use speculation::{SpeculationArgs, fared};
pub(crate) use thinking::{ThinkingArgs, parse_span};
