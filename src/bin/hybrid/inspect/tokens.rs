//! Tokens as a person reads them.

use hybrid_attention::Tokenizer;
use serde::Serialize;

/// A token and the text that it completes.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Token {
    pub(super) id: u32,
    /// Its text; for a control token the vocabulary's spelling, without a spelling `#` and its id, and
    /// empty in the middle of a character.
    pub(super) text: String,
    /// Whether it was thought about.
    pub(super) thinks: bool,
}

/// The tokens of a prompt. Those that begin in its first `context_bytes` were thought about, or all if
/// that is `None`; but never the last token, from which the answer begins.
pub(super) fn of_prompt(
    tokenizer: Option<&Tokenizer>,
    ids: &[u32],
    context_bytes: Option<usize>,
) -> Vec<Token> {
    let mut begins = 0;
    let tokens = pieces(tokenizer, &[], ids).into_iter().enumerate().map(|(index, (id, piece))| {
        let last = index + 1 == ids.len();
        let thinks = !last && context_bytes.is_none_or(|bytes| begins < bytes);
        begins += piece.len();
        Token { id, text: spelled(tokenizer, id, piece), thinks }
    });
    tokens.collect()
}

/// The tokens of an answer, none of which was thought about.
pub(super) fn of_answer(tokenizer: Option<&Tokenizer>, prompt: &[u32], ids: &[u32]) -> Vec<Token> {
    let token = |(id, piece)| Token { id, text: spelled(tokenizer, id, piece), thinks: false };
    pieces(tokenizer, prompt, ids).into_iter().map(token).collect()
}

/// The text that each token completes.
fn pieces(tokenizer: Option<&Tokenizer>, before: &[u32], ids: &[u32]) -> Vec<(u32, String)> {
    let mut stream = tokenizer.map(|tokenizer| tokenizer.decode_stream(before));
    let mut piece = |id| stream.as_mut().map_or_else(String::new, |stream| stream.push(id));
    ids.iter().map(|&id| (id, piece(id))).collect()
}

/// The name of a token that completes `piece`.
fn spelled(tokenizer: Option<&Tokenizer>, id: u32, piece: String) -> String {
    let spelling = tokenizer.and_then(|tokenizer| tokenizer.token(id));
    match (tokenizer, spelling) {
        (Some(tokenizer), Some(special)) if tokenizer.is_special(id) => special,
        (Some(_), Some(_)) => piece,
        _ => format!("#{id}"),
    }
}

/// Text with nothing invisible in it but spaces and line breaks: control characters, including those
/// that change the direction of writing, are escaped.
pub(super) fn plain(text: &str) -> String {
    let mut plain = String::new();
    for c in text.chars() {
        match c {
            ' ' | '\n' => plain.push(c),
            c if c.is_control() || is_format(c) || c.is_whitespace() => {
                plain.extend(c.escape_default());
            }
            c => plain.push(c),
        }
    }
    plain
}

/// [`plain`] text on one line, with visible signs for spaces, line breaks and empty text.
pub(super) fn visible(text: &str) -> String {
    if text.is_empty() {
        return "⋯".to_owned();
    }
    plain(text).replace(' ', "␣").replace('\n', "⏎")
}

/// Zero-width characters, direction marks, and noncharacters.
fn is_format(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

/// [`visible`], cut to `width` columns.
pub(super) fn label(text: &str, width: usize) -> String {
    let visible = visible(text);
    let mut used = 0;
    let columns = |c: char| if c < '\u{1100}' || "␣⏎".contains(c) { 1 } else { 2 };
    if visible.chars().map(columns).sum::<usize>() <= width {
        return visible;
    }
    let fits = |c: &char| {
        used += columns(*c);
        used < width
    };
    visible.chars().take_while(fits).chain(['…']).collect()
}

/// Text between tags or in an attribute.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}
