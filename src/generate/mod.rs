//! From a prompt to an answer: settings, sampling, stopping, streaming.

mod config;
mod prompt;
mod sampler;
mod stop;
mod stream;

pub use self::config::{GenerationConfig, Progress};
pub use self::prompt::Prompt;
pub use self::sampler::Sampler;
pub use self::stop::StopReason;
pub use self::stream::{Answer, Conversation, Seconds, Token, TokenStream};

pub(crate) use self::stream::Source;
