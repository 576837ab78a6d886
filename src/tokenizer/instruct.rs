//! How Mistral's models write a chat, by the version of their tokenizer: for checkpoints that bring no template.
//!
//! The texts are ours, what they write is what `mistral-common` makes of the same messages: neighbours of one role are
//! one message with a blank line between; tools are not written.

/// The version of a tokenizer by Mistral, which says how a chat is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    V1,
    V2,
    V3,
    V7,
    V11,
    V13,
    V15,
}

/// `[INST]` is text. The system prompt stands before the first of the user's messages.
const V1: &str = include_str!("instruct/v1.jinja");

/// `[INST]` is a token. The system prompt stands before the last of the user's messages.
const V3: &str = include_str!("instruct/v3.jinja");

/// The system prompt stands where it is said.
const V7: &str = include_str!("instruct/v7.jinja");

impl Version {
    pub(super) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "v1" => Self::V1,
            "v2" => Self::V2,
            "v3" => Self::V3,
            "v7" => Self::V7,
            "v11" => Self::V11,
            "v13" => Self::V13,
            "v15" => Self::V15,
            _ => return None,
        })
    }

    /// The chat template of the version. v15 has none, since it writes settings of the model into a chat.
    pub(super) fn template(self) -> Option<&'static str> {
        match self {
            Self::V1 => Some(V1),
            // These differ in how they write tools.
            Self::V2 | Self::V3 => Some(V3),
            Self::V7 | Self::V11 | Self::V13 => Some(V7),
            Self::V15 => None,
        }
    }
}
