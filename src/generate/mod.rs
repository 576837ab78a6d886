//! From a prompt to an answer: settings, sampling, stopping, streaming, guessing ahead, and choosing among
//! candidates.

mod ahead;
mod answer;
mod candidates;
mod config;
mod conversation;
mod decoder;
mod guesser;
mod lane;
mod lookup;
mod many;
mod progress;
mod prompt;
mod sampler;
mod source;
mod stop;
mod stream;
mod writer;

pub use self::answer::{Answer, Seconds, Speculated, Token};
pub use self::candidates::{Candidates, Extract, Reason, Score, Stub};
pub use self::config::GenerationConfig;
pub use self::conversation::Conversation;
pub use self::lookup::PromptLookup;
pub use self::many::Answers;
pub use self::progress::Progress;
pub use self::prompt::Prompt;
pub use self::sampler::Sampler;
pub use self::stop::StopReason;
pub use self::stream::TokenStream;

pub(crate) use self::source::Source;
