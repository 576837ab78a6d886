//! How much longer a `tokenizer.json` may make a text.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// How many times as long as a text what becomes of it may be. Marking spaces, the commonest step, makes
/// three bytes of one.
const MOST: usize = 64;

/// Steps of one kind. The longest lists on record have some dozens.
const MOST_STEPS: usize = 256;

/// The parts of a `tokenizer.json` that change a text; the vocabulary, which is most of the file, is passed
/// over.
#[derive(Deserialize)]
struct Parts {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    decoder: Option<Value>,
}

/// Refuses a file in which each of a few steps makes the text longer that the step before left: forty that
/// double it make 2^40 of one letter. What does not parse is left to who reads the file.
pub(super) fn check(tokenizer_json: &[u8]) -> Result<()> {
    let Ok(parts) = serde_json::from_slice::<Parts>(tokenizer_json) else { return Ok(()) };
    let parts = [
        ("normalizer", parts.normalizer),
        ("pre_tokenizer", parts.pre_tokenizer),
        ("decoder", parts.decoder),
    ];
    for (field, part) in parts {
        let mut steps = Vec::new();
        part.iter().for_each(|part| collect(part, &mut steps));
        let field = || format!("{field} of tokenizer.json");
        if steps.len() > MOST_STEPS {
            return Err(Error::config(field(), format!("at most {MOST_STEPS} steps"), steps.len()));
        }
        let growth = steps.iter().map(|step| growth(step)).fold(1, usize::saturating_mul);
        if growth > MOST {
            let mut kinds = BTreeMap::<_, usize>::new();
            for step in steps.iter().filter(|step| self::growth(step) > 1) {
                *kinds.entry(kind(step).unwrap_or_default()).or_default() += 1;
            }
            let kinds = kinds.iter().map(|(kind, count)| format!("{count} {kind}"));
            let kinds = kinds.collect::<Vec<_>>().join(", ");
            let expected = format!("steps that make a text at most {MOST} times as long");
            return Err(Error::config(field(), expected, format!("{growth} times by {kinds}")));
        }
    }
    Ok(())
}

/// The steps of a part, one after the other, those of sequences in it too.
fn collect<'v>(part: &'v Value, steps: &mut Vec<&'v Value>) {
    if kind(part) != Some("Sequence") {
        return steps.push(part);
    }
    // What each kind of part calls its own.
    for list in ["normalizers", "pretokenizers", "decoders"] {
        let list = part.get(list).and_then(Value::as_array);
        list.into_iter().flatten().for_each(|part| collect(part, steps));
    }
}

fn kind(part: &Value) -> Option<&str> {
    part.get("type")?.as_str()
}

/// How many times as long a step makes a text, at most or nearly so.
fn growth(step: &Value) -> usize {
    match kind(step) {
        Some("Replace") => {
            let content = step.get("content").and_then(Value::as_str).unwrap_or_default().len();
            let pattern = step.get("pattern");
            let text = |kind: &str| pattern.and_then(|it| it.get(kind)).and_then(Value::as_str);
            let shortest = match (text("String"), text("Regex")) {
                (Some(text), _) => text.len(),
                // One that is not understood here (it looks around, say) may match between letters.
                (None, Some(regex)) => shortest(regex).unwrap_or(0),
                (None, None) => 0,
            };
            content.checked_div(shortest).map_or(content + 1, |times| times.max(1))
        }
        // Every byte becomes a letter, some of two bytes.
        Some("ByteLevel") => 2,
        // A table that the file brings; those of SentencePiece are of compatibility forms.
        Some("Precompiled") => 4,
        _ => 1,
    }
}

/// Bytes of the shortest match.
fn shortest(regex: &str) -> Option<usize> {
    // Without classes of Unicode, as which `\w` and the like have one byte here too.
    let parser = || regex_syntax::ParserBuilder::new().unicode(false).utf8(false).build();
    parser().parse(regex).ok()?.properties().minimum_len()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(normalizer: &Value) -> String {
        match check(json!({ "normalizer": normalizer, "model": {} }).to_string().as_bytes()) {
            Ok(()) => "accepted".to_string(),
            Err(error) => error.to_string(),
        }
    }

    fn replace(pattern: &str, content: &str) -> Value {
        json!({ "type": "Replace", "pattern": { "String": pattern }, "content": content })
    }

    fn sequence(steps: &[Value]) -> Value {
        json!({ "type": "Sequence", "normalizers": steps })
    }

    #[test]
    fn a_text_grows_within_bounds_or_the_step_is_named() {
        let field = "config field normalizer of tokenizer.json: expected";
        let bound = "steps that make a text at most 64 times as long";
        assert_eq!(refusal(&sequence(&vec![replace("a", "b"); 200])), "accepted");
        assert_eq!(
            refusal(&sequence(&vec![replace("a", "b"); 257])),
            format!("{field} at most 256 steps, got 257")
        );
        assert_eq!(
            refusal(&sequence(&[replace(" ", "▁"), replace("``", "\""), replace("ß", "ss")])),
            "accepted"
        );
        let forty = refusal(&sequence(&vec![replace("a", "aa"); 40]));
        assert_eq!(forty, format!("{field} {bound}, got 1099511627776 times by 40 Replace"));
        let nested =
            sequence(&[sequence(&[replace("a", &"b".repeat(9))]), replace("b", &"c".repeat(8))]);
        assert_eq!(refusal(&nested), format!("{field} {bound}, got 72 times by 2 Replace"));
        let between =
            json!({ "type": "Replace", "pattern": { "Regex": "x*" }, "content": "y".repeat(64) });
        assert_eq!(refusal(&between), format!("{field} {bound}, got 65 times by 1 Replace"));
        let spaces = json!({ "type": "Replace", "pattern": { "Regex": r"\s{2,}" }, "content": " ".repeat(64) });
        assert_eq!(refusal(&spaces), "accepted");
    }
}
