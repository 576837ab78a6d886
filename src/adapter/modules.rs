//! Names of modules, and the expressions that match them: bounded, whatever a file says.

use regex_automata::nfa::thompson::pikevm::PikeVM;
use regex_automata::nfa::thompson::{Compiler, Config, WhichCaptures};
use regex_automata::{Input, MatchKind, PatternSet};
use regex_syntax::ParserBuilder;
use regex_syntax::hir::{Dot, Hir, Look, Repetition};

use crate::error::{Error, Result};

/// Names, or patterns, of one field. The largest models have some hundred modules to name.
const MOST: usize = 10_000;

/// Bytes of them all.
const MOST_TEXT: usize = 1 << 20;

/// Bytes of one expression. While it is parsed it takes some hundred times as much.
const LONGEST: usize = 1024;

/// Bytes that the expressions of one field may take, compiled: time to match grows with it.
const COMPILED: usize = 4 << 20;

/// Some modules.
#[derive(Debug)]
pub(super) enum Names {
    /// All but the head.
    AllLinear,
    EndingWith(Vec<String>),
    /// Those whose whole name an expression matches.
    Matching(Expressions),
}

impl Names {
    /// Those whose names end with one of these.
    pub(super) fn ending_with(field: &str, names: &[String]) -> Result<Self> {
        check(field, names)?;
        Ok(Self::EndingWith(names.to_vec()))
    }

    /// Those whose whole name this regular expression matches. `all-linear` is all but the head.
    pub(super) fn matching(field: &str, pattern: &str) -> Result<Self> {
        if pattern.eq_ignore_ascii_case("all-linear") {
            return Ok(Self::AllLinear);
        }
        let whole = |expression| Hir::concat(vec![start(), expression, end()]);
        let expression = whole(parsed(field, pattern)?);
        Ok(Self::Matching(Expressions::new(field, &[expression])?))
    }

    pub(super) fn contain(&self, module: &str) -> bool {
        match self {
            Self::AllLinear => module != "lm_head",
            Self::EndingWith(names) => names.iter().any(|name| ends_with(module, name)),
            Self::Matching(expressions) => expressions.first(module).is_some(),
        }
    }
}

/// What patterns say of the modules that they match; the first that matches counts.
#[derive(Debug)]
pub(super) struct Patterns<T> {
    /// With the place of each among all patterns.
    plain: Vec<(usize, String)>,
    expressions: Option<Expressions>,
    /// The place of each expression among all patterns.
    places: Vec<usize>,
    values: Vec<T>,
}

impl<T: Copy> Patterns<T> {
    /// Each matches what Python's `re.match(rf"(.*\.)?({pattern})$", name)` finds.
    pub(super) fn new(field: &str, patterns: &[(String, T)]) -> Result<Self> {
        check(field, patterns.iter().map(|(pattern, _)| pattern))?;
        let (mut plain, mut expressions, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (place, (pattern, _)) in patterns.iter().enumerate() {
            // Mostly there is one plain name for each module: no expression is needed for these. The
            // points of a name match any character, but names differ in more than that.
            if pattern.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c)) {
                plain.push((place, pattern.clone()));
                continue;
            }
            let expression = parsed(field, pattern)?;
            expressions.push(Hir::concat(vec![start(), prefix(), expression, end()]));
            places.push(place);
        }
        let expressions = match expressions.is_empty() {
            true => None,
            false => Some(Expressions::new(field, &expressions)?),
        };
        let values = patterns.iter().map(|(_, value)| *value).collect();
        Ok(Self { plain, expressions, places, values })
    }

    /// What the first pattern says that matches `module`.
    pub(super) fn first(&self, module: &str) -> Option<T> {
        let plain = self.plain.iter().find(|(_, name)| ends_with(module, name));
        let plain = plain.map(|(place, _)| *place);
        let expression = self.expressions.as_ref().and_then(|it| it.first(module));
        let expression = expression.and_then(|index| self.places.get(index).copied());
        let first = plain.into_iter().chain(expression).min()?;
        self.values.get(first).copied()
    }
}

/// Expressions that are all matched at once, by an automaton that needs no more memory than it was built
/// with and time in proportion to it.
#[derive(Debug)]
pub(super) struct Expressions(PikeVM);

impl Expressions {
    fn new(field: &str, expressions: &[Hir]) -> Result<Self> {
        let config = Config::new()
            .utf8(false)
            .nfa_size_limit(Some(COMPILED))
            .which_captures(WhichCaptures::None);
        let nfa = Compiler::new().configure(config).build_many_from_hir(expressions);
        let nfa = nfa.map_err(|error| match error.size_limit() {
            Some(limit) => {
                let expected = format!("regular expressions that compile to at most {limit} bytes");
                Error::config(field, expected, "larger ones")
            }
            None => unsupported(field, error),
        })?;
        let all = PikeVM::config().match_kind(MatchKind::All);
        let automaton = PikeVM::builder().configure(all).build_from_nfa(nfa);
        automaton.map(Self).map_err(|error| unsupported(field, error))
    }

    /// The first of them that matches.
    fn first(&self, module: &str) -> Option<usize> {
        let mut matched = PatternSet::new(self.0.get_nfa().pattern_len());
        let mut cache = self.0.create_cache();
        self.0.which_overlapping_matches(&mut cache, &Input::new(module), &mut matched);
        matched.iter().next().map(|pattern| pattern.as_usize())
    }
}

/// Refuses a field that is larger than any that somebody means.
fn check<S: AsRef<str>>(field: &str, names: impl IntoIterator<Item = S>) -> Result<()> {
    let (mut count, mut text) = (0, 0usize);
    for name in names {
        count += 1;
        text = text.saturating_add(name.as_ref().len());
    }
    if count > MOST {
        return Err(Error::config(field, format!("at most {MOST} entries"), count));
    }
    if text > MOST_TEXT {
        return Err(Error::config(field, format!("at most {MOST_TEXT} bytes in all"), text));
    }
    Ok(())
}

/// A pattern by itself: one that is valid only within what is put around it is not meant.
fn parsed(field: &str, pattern: &str) -> Result<Hir> {
    if pattern.len() > LONGEST {
        let expected = format!("regular expressions of at most {LONGEST} bytes");
        return Err(Error::config(field, expected, pattern.len()));
    }
    // Names are ASCII: classes of Unicode would only take room.
    let parsed = ParserBuilder::new().unicode(false).utf8(false).build().parse(pattern);
    parsed.map_err(|_| unsupported(field, format!("the regular expression {pattern}")))
}

fn unsupported(field: &str, got: impl ToString) -> Error {
    Error::unsupported(format!("adapter field {field}"), got)
}

fn start() -> Hir {
    Hir::look(Look::Start)
}

fn end() -> Hir {
    Hir::look(Look::End)
}

/// `(?:.*\.)?`
fn prefix() -> Hir {
    let repeated =
        |min, max, sub| Hir::repetition(Repetition { min, max, greedy: true, sub: Box::new(sub) });
    let any = repeated(0, None, Hir::dot(Dot::AnyByteExceptLF));
    repeated(0, Some(1), Hir::concat(vec![any, Hir::literal(*b".")]))
}

/// Whether a name is this, or ends with it after a point.
fn ends_with(module: &str, name: &str) -> bool {
    let before = module.strip_suffix(name);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn patterns(count: usize) -> Vec<(String, usize)> {
        let one = |n| (format!(r"model\.layers\.{n}\.self_attn\.[qv]_proj"), n);
        (0..count).map(one).collect()
    }

    #[test]
    fn the_first_pattern_that_matches_counts() -> Result<()> {
        let of = |patterns: &[(&str, usize)]| {
            let patterns: Vec<_> = patterns.iter().map(|(it, n)| (it.to_string(), *n)).collect();
            Ok::<_, Error>(Patterns::new("rank_pattern", &patterns)?.first("layers.3.mlp.up_proj"))
        };
        assert_eq!(of(&[("q_proj", 1), (".*_proj", 2), ("up_proj", 3)])?, Some(2));
        assert_eq!(of(&[("up_proj", 3), (".*_proj", 2)])?, Some(3));
        assert_eq!(of(&[(r"p_proj|\d", 1), (r"mlp\.(up|down)_proj", 2)])?, Some(2));
        assert_eq!(of(&[(r"(?x) up_proj # spelled out", 2)])?, Some(2));
        assert_eq!(of(&[("roj", 1), ("[a-z]{3}roj", 1)])?, None);
        Ok(())
    }

    #[test]
    fn many_patterns_take_little_and_too_many_are_refused() -> Result<()> {
        let start = Instant::now();
        let thousand = Patterns::new("rank_pattern", &patterns(1000))?;
        for layer in 0..32 {
            let name = format!("model.layers.{layer}.self_attn.v_proj");
            assert_eq!(thousand.first(&name), Some(layer));
        }
        assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());

        let refused = |patterns: &[(String, usize)]| match Patterns::new("rank_pattern", patterns) {
            Ok(_) => "accepted".to_string(),
            Err(error) => error.to_string(),
        };
        let start = Instant::now();
        let of = "config field rank_pattern: expected";
        let expected = format!("{of} at most 10000 entries, got 100000");
        assert_eq!(refused(&patterns(100_000)), expected);
        let expected = format!("{of} at most 1048576 bytes in all, got 2000000");
        assert_eq!(refused(&vec![("a".repeat(1000), 1); 2000]), expected);
        let expected = format!("{of} regular expressions of at most 1024 bytes, got 2000");
        assert_eq!(refused(&[("a*".repeat(1000), 1)]), expected);
        let expected = format!(
            "{of} regular expressions that compile to at most 4194304 bytes, got larger ones"
        );
        assert_eq!(refused(&[("((a{1000}){1000}){1000}".into(), 1)]), expected);
        assert_eq!(refused(&vec![(r"\w{0,900}".into(), 1); 9000]), expected);
        assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());
        Ok(())
    }

    #[test]
    fn a_pattern_is_valid_by_itself_or_not_at_all() {
        for pattern in ["q_proj)|(.*", "(?x)q_proj #", "q_proj\\"] {
            let valid = pattern.ends_with('#');
            assert_eq!(Names::matching("target_modules", pattern).is_ok(), valid, "{pattern}");
            let ranks = Patterns::new("rank_pattern", &[(pattern.to_string(), 1)]);
            assert_eq!(ranks.is_ok(), valid, "{pattern}");
        }
    }
}
