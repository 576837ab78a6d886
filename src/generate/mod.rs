//! From a prompt to an answer: settings, sampling, stopping, streaming.

mod answer;
mod config;
mod conversation;
mod prompt;
mod reader;
mod sampler;
mod stop;
mod stream;

pub use self::answer::{Answer, Seconds, Token};
pub use self::config::{GenerationConfig, Progress};
pub use self::conversation::Conversation;
pub use self::prompt::Prompt;
pub use self::sampler::Sampler;
pub use self::stop::StopReason;
pub use self::stream::TokenStream;

pub(crate) use self::stream::Source;
