//! Long texts in pieces, and what `memory::evaluate` says of ways to find texts: beside memories that find them so.

mod common;

use std::collections::BTreeMap;

use hybrid_attention::memory::evaluate::{Compared, Passage, Retrieval, Row};
use hybrid_attention::memory::{
    Embedding, Memory, Note, NoteId, Recall, Salience, Volatile, pieces,
};
use hybrid_attention::{Config, Error, HybridModel, Tokenizer};
use proptest::prelude::*;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use common::tiny;
use common::{Result, fixture};

fn tokenizer(name: &str) -> Result<Tokenizer> {
    Ok(Tokenizer::from_folder(&fixture("tokenizer").join(name))?.ok_or("no tokenizer")?)
}

fn model() -> Result<HybridModel> {
    let config = Config { vocab_size: 512, ..tiny::config() };
    Ok(HybridModel::new(tiny::transformer(&config, 1)?, Some(tokenizer("llama")?))?)
}

/// Texts of words that no two of them have in the same order.
fn texts(count: usize) -> Vec<String> {
    const WORDS: [&str; 16] = [
        "boat", "harbour", "old", "clock", "rain", "the", "a", "door", "red", "sank", "stopped",
        "why", "nobody", "knew", "baker", "town",
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let text = |index: usize| -> String {
        let words: Vec<&str> = (0..30).filter_map(|_| WORDS.choose(&mut rng).copied()).collect();
        let mut text = words.join(" ");
        let at = rng.random_range(5..20);
        text.insert(text.match_indices(' ').nth(at).map_or(0, |(at, _)| at), ',');
        format!("{index} {text}") // so that whatever is chosen of two texts, its states differ
    };
    (0..count).map(text).collect()
}

fn passages(model: &HybridModel, count: usize) -> Result<Vec<Passage>> {
    let cut = |text: &String| Passage::cut(model, text, 24).transpose();
    Ok(texts(count).iter().filter_map(cut).collect::<hybrid_attention::Result<_>>()?)
}

fn find<'a>(
    rows: &'a [Row],
    name: &str,
    compared: Compared,
    share: Option<f64>,
) -> Result<&'a Row> {
    let found = rows
        .iter()
        .find(|row| (row.name.as_str(), row.compared, row.share) == (name, compared, share));
    Ok(found.ok_or_else(|| format!("no row {name} {compared:?} {share:?}"))?)
}

/// The reciprocal ranks at which a memory recalls the passages.
fn recalled(model: &HybridModel, passages: &[Passage], embedding: Embedding) -> Result<Vec<f64>> {
    let memory = Memory::over(Volatile::default(), model, embedding)?;
    memory.remember_all(passages.iter().map(|it| (&it.stored, Note::default())))?;
    assert_eq!(memory.len()?, passages.len(), "the texts differ");
    let rank = |passage: &Passage| -> Result<f64> {
        let found = memory.recall(&passage.query, &Recall::best(passages.len()))?;
        assert_eq!(found.len(), passages.len(), "none is a near-duplicate");
        let own = NoteId::of(&passage.stored);
        let at = found.iter().position(|note| note.id == own).ok_or("not recalled")?;
        Ok(1.0 / (at + 1) as f64)
    };
    passages.iter().map(rank).collect()
}

#[test]
fn rows_are_the_ranks_at_which_memories_recall() -> Result {
    let model = model()?;
    let passages = passages(&model, 12)?;
    assert_eq!(passages.len(), 12);
    let retrieval = Retrieval { shares: vec![0.3, 0.6], ..Retrieval::default() };
    let count = std::cell::Cell::new(0);
    let rows = retrieval.run(&model, &passages, || count.set(count.get() + 1))?;
    assert_eq!((count.get(), rows.len()), (12, 2 + 2 * (1 + 2 * 8)));
    let whole = find(&rows, Retrieval::WHOLE, Compared::Vectors, None)?;
    assert_eq!(whole.reciprocal_ranks, recalled(&model, &passages, Embedding::default())?);
    let all = Salience::lead().share(1.0);
    for (compared, embedding) in [
        (Compared::Vectors, Embedding::MainPoint as fn(Salience) -> Embedding),
        (Compared::Words, Embedding::Words),
    ] {
        let row = find(&rows, "all words", compared, None)?;
        assert_eq!(row.reciprocal_ranks, recalled(&model, &passages, embedding(all.clone()))?);
        for share in retrieval.shares.iter().copied() {
            let lead = ("lead".to_owned(), Salience::lead());
            for (name, salience) in retrieval.ways.iter().chain([&lead]) {
                let row = find(&rows, name, compared, Some(share))?;
                let salience = salience.clone().share(share);
                let right = recalled(&model, &passages, embedding(salience))?;
                assert_eq!(row.reciprocal_ranks, right, "{name} {share} {compared:?}");
                let first = right.iter().map(|rank| f64::from(u8::from(*rank == 1.0)));
                assert_eq!(row.found_first, first.collect::<Vec<_>>());
            }
        }
    }
    Ok(())
}

#[test]
fn chance_is_drawn_again_and_the_same_again() -> Result {
    let model = model()?;
    let passages = passages(&model, 9)?;
    let run = |draws| -> Result<Vec<Row>> {
        let retrieval = Retrieval { ways: Vec::new(), shares: vec![0.3], draws };
        Ok(retrieval.run(&model, &passages, || ())?)
    };
    let (one, four) = (run(1)?, run(4)?);
    let random = |rows: &[Row]| -> Result<Vec<f64>> {
        let row = find(rows, Retrieval::RANDOM, Compared::Vectors, Some(0.3))?;
        Ok(row.reciprocal_ranks.clone())
    };
    assert_eq!(random(&four)?, random(&run(4)?)?);
    assert_ne!(random(&four)?, random(&one)?, "other draws");
    for (row, other) in one.iter().zip(&four).filter(|(row, _)| row.name != Retrieval::RANDOM) {
        assert_eq!(row.reciprocal_ranks, other.reciprocal_ranks, "{}", row.name);
    }
    Ok(())
}

/// By the textbook: counts times `ln((1 + n) / (1 + df)) + 1`, and the cosine.
#[test]
fn tf_idf_is_that_of_the_textbook() -> Result {
    let model = model()?;
    let passages = passages(&model, 15)?;
    let retrieval = Retrieval { ways: Vec::new(), shares: Vec::new(), draws: 1 };
    let rows = retrieval.run(&model, &passages, || ())?;
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_alphanumeric())
            .filter(|it| !it.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let n = passages.len() as f64;
    let vector = |text: &str| -> BTreeMap<String, f64> {
        let mut counts = BTreeMap::new();
        words(text).into_iter().for_each(|word| *counts.entry(word).or_insert(0.0) += 1.0);
        for (word, count) in &mut counts {
            let with = passages.iter().filter(|it| words(&it.stored).contains(word)).count() as f64;
            *count *= ((1.0 + n) / (1.0 + with)).ln() + 1.0;
        }
        counts
    };
    let dot = |a: &BTreeMap<String, f64>, b: &BTreeMap<String, f64>| -> f64 {
        a.iter().map(|(word, x)| x * b.get(word).copied().unwrap_or(0.0)).sum()
    };
    let mut right = Vec::new();
    for passage in &passages {
        let query = vector(&passage.query);
        let score = |stored: &str| {
            let stored = vector(stored);
            dot(&query, &stored) / (dot(&query, &query) * dot(&stored, &stored)).sqrt()
        };
        let own = score(&passage.stored);
        // The others come first where they are as good, as where no word of the query is in any of them.
        let above = passages.iter().filter(|it| score(&it.stored) > own - 1e-7).count();
        right.push(1.0 / above as f64);
    }
    assert_eq!(find(&rows, "tf-idf", Compared::Counts, None)?.reciprocal_ranks, right);
    Ok(())
}

#[test]
fn passages_are_neighbours_of_whole_words() -> Result {
    let model = model()?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let text = "  The old harbour master's boat sank; nobody at all knew why, nor when.";
    for tokens in 1..200 {
        match Passage::cut(&model, text, tokens)? {
            Some(Passage { stored, query }) => {
                let rest = text.trim().strip_prefix(&stored).ok_or("not the beginning")?;
                assert!(rest.trim().starts_with(&query), "{stored:?} {query:?}");
                assert!(!rest.starts_with(char::is_alphanumeric) && stored.trim() == stored);
                let after = rest.trim().strip_prefix(&query).ok_or("not the next")?;
                assert!(!after.starts_with(char::is_alphanumeric), "{query:?} {after:?}");
                assert!(tokenizer.encode(&stored, true)?.len() <= tokens);
            }
            None => {
                let enough = tokenizer.encode(text.trim(), true)?.len() >= 2 * tokens;
                assert!(!enough || tokens < 20, "{tokens}");
            }
        }
    }
    assert_eq!(Passage::cut(&model, text, 0)?, None);
    assert_eq!(Passage::cut(&model, text, usize::MAX)?, None);
    assert!(Passage::cut(&model, text, 20)?.is_some());
    Ok(())
}

#[test]
fn what_cannot_be_compared_is_named() -> Result {
    let model = model()?;
    let passages = passages(&model, 3)?;
    let run = |retrieval: Retrieval, passages: &[Passage]| retrieval.run(&model, passages, || ());
    for wrong in [
        run(Retrieval::default(), &passages[..1]),
        run(Retrieval { draws: 0, ..Retrieval::default() }, &passages),
        run(Retrieval { shares: vec![0.0], ..Retrieval::default() }, &passages),
        run(Retrieval { shares: vec![f64::NAN], ..Retrieval::default() }, &passages),
    ] {
        assert!(matches!(wrong, Err(Error::Parameter { .. })), "{wrong:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pieces_are_all_of_a_text_and_not_too_long(
        text in prop_oneof![
            "([a-zA-Z]{1,9}[.!?]?( |\n\n|  ){1,2}){0,60}",
            "(\\PC|[a-z ]){0,120}",
        ],
        most in 16usize..40,
        name in prop_oneof![Just("llama"), Just("byte_level")],
    ) {
        tiny::holds(pieces_hold(&text, most, name))?;
    }
}

fn pieces_hold(text: &str, most: usize, name: &str) -> Result {
    let tokenizer = tokenizer(name)?;
    let (mut at, ranges) = (0, pieces(&tokenizer, text, most)?);
    for range in &ranges {
        let between = text.get(at..range.start).ok_or("pieces out of order")?;
        let piece = text.get(range.clone()).ok_or("no characters")?;
        assert!(between.trim().is_empty() && !piece.is_empty() && piece.trim() == piece);
        let tokens = tokenizer.encode(piece, true)?.len();
        assert!(tokens <= most, "{tokens} of {most}: {piece:?}");
        at = range.end;
    }
    assert!(text.get(at..).ok_or("past the end")?.trim().is_empty());
    let fits = tokenizer.encode(text.trim(), true)?.len() <= most;
    assert!(!fits || ranges.len() <= 1, "{ranges:?}");
    Ok(())
}

#[test]
fn pieces_end_where_something_does() -> Result {
    let tokenizer = tokenizer("llama")?;
    let text = "One two three four. ".repeat(40);
    let pieces_of = |most| -> Result<Vec<String>> {
        let ranges = pieces(&tokenizer, &text, most)?;
        Ok(ranges.into_iter().map(|range| text[range].to_owned()).collect())
    };
    let found = pieces_of(64)?;
    assert!(found.len() > 2 && found.iter().all(|piece| piece.ends_with("four.")), "{found:?}");
    assert_eq!(pieces_of(10_000)?, [text.trim()]);
    assert!(matches!(pieces(&tokenizer, "x", 15), Err(Error::Parameter { .. })));
    assert!(pieces(&tokenizer, " \n", 16)?.is_empty());
    Ok(())
}
