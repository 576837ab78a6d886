//! Every store through the same cases, and a memory over each.

mod common;

use std::collections::BTreeMap;

#[cfg(feature = "redb")]
use hybrid_attention::Thinking;
use hybrid_attention::memory::store::{Hit, Recency, Search};
use hybrid_attention::memory::{
    Embedding, Memory, Note, NoteId, Recall, Record, Salience, Store, Volatile,
};
use hybrid_attention::{
    Config, EmbedConfig, Error, GenerationConfig, HybridModel, Pooling, Tokenizer,
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use common::tiny;
use common::{Result, fixture};

/// Runs a case over every kind of store, each empty.
fn each(case: impl Fn(&str, Box<dyn Store>) -> Result) -> Result {
    case("volatile", Box::new(Volatile::default()))?;
    #[cfg(feature = "redb")]
    {
        let folder = tempfile::tempdir()?;
        let store = hybrid_attention::memory::Embedded::open(folder.path().join("notes.redb"))?;
        case("embedded", Box::new(store))?;
    }
    #[cfg(feature = "pgvector")]
    if let Some(schema) = common::server::Schema::empty()? {
        case("postgres", Box::new(hybrid_attention::memory::Postgres::connect(&schema.to())?))?;
    }
    Ok(())
}

fn record(text: &str, vectors: &[&[f32]]) -> Record {
    Record {
        id: NoteId::of(text),
        text: text.to_owned(),
        note: Note::default().time(0),
        superseded_by: None,
        spans: Vec::new(),
        vectors: vectors.iter().map(|vector| vector.to_vec()).collect(),
    }
}

fn search(vectors: &[&[f32]], best: usize) -> Search {
    let vectors = vectors.iter().map(|vector| vector.to_vec()).collect();
    Search { vectors, best, ..Search::default() }
}

#[test]
fn what_was_put_is_there_once() -> Result {
    each(|name, store| {
        assert!(store.is_empty()? && store.page(None, 9)?.is_empty(), "{name}");
        assert!(store.nearest(&search(&[&[1.0, 0.0]], 3))?.is_empty());
        let mut a = record("a", &[&[1.0, 0.0], &[0.0, 1.0]]);
        a.note = a.note.tag("k", "v").source("s");
        a.spans = vec![(0, 1, 0.5)];
        let b = record("b", &[&[0.6, 0.8]]);
        store.put(&[a.clone(), b.clone()])?;
        store.put(std::slice::from_ref(&b))?;
        assert_eq!(
            (store.len()?, store.get(a.id)?, store.get(b.id)?),
            (2, Some(a.clone()), Some(b.clone()))
        );
        assert_eq!(store.get(NoteId::of("c"))?, None);
        let mut all = vec![a.clone(), b.clone()];
        all.sort_by_key(|record| record.id);
        assert_eq!(store.page(None, 9)?, all);
        assert_eq!(store.page(None, 1)?, all[..1]);
        assert_eq!(store.page(Some(all[0].id), 9)?, all[1..]);
        assert!(store.page(Some(all[1].id), 9)?.is_empty() && store.page(None, 0)?.is_empty());
        assert!(store.remove(a.id)? && !store.remove(a.id)?);
        assert_eq!((store.len()?, store.get(a.id)?), (1, None));
        assert_eq!(store.nearest(&search(&[&[1.0, 0.0]], 3))?, [Hit { id: b.id, score: 0.6 }]);
        Ok(())
    })
}

#[test]
fn many_come_in_the_order_that_they_are_asked_for_in() -> Result {
    each(|name, store| {
        let records: Vec<Record> =
            ["a", "b", "c"].map(|text| record(text, &[&[1.0, 0.0], &[0.0, 1.0]])).into();
        store.put(&records)?;
        let [a, b, c] = ["a", "b", "c"].map(NoteId::of);
        let found = store.get_many(&[c, NoteId::of("none"), a, c])?;
        let right = [&records[2], &records[0], &records[2]];
        assert_eq!(found.iter().collect::<Vec<_>>(), right, "{name}");
        assert!(store.get_many(&[])?.is_empty());
        assert!(store.remove(b)? && store.get_many(&[b])?.is_empty());
        Ok(())
    })
}

#[test]
fn the_first_manifest_stays() -> Result {
    each(|name, store| {
        assert_eq!(store.manifest()?, None, "{name}");
        assert_eq!(store.claim("one")?, "one");
        assert_eq!(store.claim("two")?, "one");
        assert_eq!(store.manifest()?.as_deref(), Some("one"));
        Ok(())
    })
}

#[test]
fn vectors_that_do_not_fit_change_nothing() -> Result {
    each(|name, store| {
        store.put(&[record("a", &[&[1.0, 0.0]])])?;
        for wrong in [
            record("b", &[]),
            record("b", &[&[]]),
            record("b", &[&[1.0]]),
            record("b", &[&[1.0, 0.0], &[1.0]]),
            record("b", &[&[f32::NAN, 0.0]]),
            record("b", &[&[1.0, f32::INFINITY]]),
        ] {
            assert!(store.put(&[record("c", &[&[0.0, 1.0]]), wrong]).is_err(), "{name}");
            assert_eq!(store.len()?, 1);
        }
        for wrong in [&[1.0f32][..], &[], &[f32::NAN, 1.0]] {
            assert!(store.nearest(&search(&[wrong], 1)).is_err(), "{name}");
        }
        Ok(())
    })
}

/// Scores of all notes by hand, filtered and in order.
fn by_hand(records: &[Record], search: &Search) -> Vec<Hit> {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let score = |record: &Record| {
        let best = search.vectors.iter().map(|query| {
            record.vectors.iter().map(|own| dot(query, own)).fold(f64::NEG_INFINITY, f64::max)
        });
        let mut score = best.sum::<f64>() / search.vectors.len() as f64;
        if let Some(Recency { weight, half_life, now }) = search.recency {
            let age = (now - record.note.time.unwrap_or(0)).max(0) as f64;
            let weight = f64::from(weight);
            score = (1.0 - weight) * score + weight * (-age / half_life).exp2();
        }
        score as f32
    };
    let fits = |record: &&Record| {
        record.superseded_by.is_none()
            && search.tags.iter().all(|(name, value)| record.note.tags.get(name) == Some(value))
    };
    let hits =
        records.iter().filter(fits).map(|record| Hit { id: record.id, score: score(record) });
    let mut hits: Vec<Hit> =
        hits.filter(|hit| search.min_score.is_none_or(|least| hit.score >= least)).collect();
    hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.id.cmp(&b.id)));
    hits.truncate(search.best);
    hits
}

#[test]
fn the_nearest_are_those_of_a_plain_search() -> Result {
    each(|name, store| {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut vector = |width: usize| -> Vec<f32> {
            (0..width).map(|_| rng.random_range(-1f32..1.0)).collect()
        };
        let width = 37;
        let mut records: Vec<Record> = Vec::new();
        for index in 0..200usize {
            let vectors = (0..1 + index % 3).map(|_| vector(width)).collect();
            let note = Note::default()
                .time(index as i64 * 1000)
                .tag("half", if index % 2 == 0 { "0" } else { "1" });
            let mut one = Record { note, vectors, ..record(&format!("text {index}"), &[]) };
            one.superseded_by = (index % 10 == 3).then(|| NoteId::of("other"));
            records.push(one);
        }
        store.put(&records)?;
        // Some are replaced, many removed.
        for index in (0..120).step_by(2) {
            assert!(store.remove(records[index].id)?);
        }
        records[150].vectors = vec![vector(width)];
        store.put(&records[150..151])?;
        let left: Vec<Record> = records
            .iter()
            .enumerate()
            .filter(|(index, _)| *index >= 120 || index % 2 == 1)
            .map(|(_, record)| record.clone())
            .collect();
        for (queries, best, min_score, tag, weight) in [
            (1, 5, None, None, None),
            (3, 500, None, Some("0"), None),
            (2, 10, Some(0.5), None, Some(0.3)),
            (1, 4, Some(-0.2), Some("1"), Some(1.0)),
            (1, 0, None, None, None),
            (1, 7, None, Some("none of them"), None),
        ] {
            let search = Search {
                vectors: (0..queries).map(|_| vector(width)).collect(),
                best,
                min_score,
                tags: tag
                    .iter()
                    .map(|tag| ("half".to_owned(), (*tag).to_owned()))
                    .collect::<BTreeMap<_, _>>(),
                recency: weight.map(|weight| Recency { weight, half_life: 20_000.0, now: 150_000 }),
            };
            let (found, right) = (store.nearest(&search)?, by_hand(&left, &search));
            let names = |hits: &[Hit]| hits.iter().map(|hit| hit.id).collect::<Vec<_>>();
            assert_eq!(names(&found), names(&right), "{name} {queries} {best}");
            for (found, right) in found.iter().zip(&right) {
                assert!((found.score - right.score).abs() < 1e-5, "{name}");
            }
        }
        Ok(())
    })
}

#[test]
fn any_text_is_kept_as_it_is() -> Result {
    each(|name, store| {
        let odd = [
            "'; DROP TABLE notes; --",
            "\"}{",
            "\u{0}",
            "é\u{301}\u{1f600}\r\n",
            "</s><|im_end|>",
            &"x".repeat(100_000),
        ];
        for text in odd {
            let mut odd = record(text, &[&[0.5, 0.5]]);
            odd.note = odd.note.tag("'; DROP", "\" OR 1=1").source("C:\\%s");
            store.put(&[odd.clone()])?;
            assert_eq!(store.get(odd.id)?, Some(odd), "{name}");
        }
        let mut tagged = search(&[&[1.0, 1.0]], 99);
        tagged.tags.insert("'; DROP".into(), "\" OR 1=1".into());
        assert_eq!(store.nearest(&tagged)?.len(), odd.len());
        tagged.tags.insert("'; DROP".into(), "' OR '1'='1".into());
        assert!(store.nearest(&tagged)?.is_empty());
        Ok(())
    })
}

#[test]
fn threads_write_and_search_at_once() -> Result {
    each(|name, store| {
        let failed = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4usize)
                .map(|thread| {
                    let store = &store;
                    scope.spawn(move || -> hybrid_attention::Result<()> {
                        for index in 0..25usize {
                            store.put(&[record(
                                &format!("{thread} {index}"),
                                &[&[1.0, index as f32]],
                            )])?;
                            let found = store.nearest(&search(&[&[0.0, 1.0]], 3))?;
                            assert!(!found.is_empty());
                        }
                        Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .filter_map(|thread| thread.join().ok())
                .filter_map(std::result::Result::err)
                .next()
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        assert_eq!(store.len()?, 100, "{name}");
        Ok(())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn names_are_read_as_they_are_written(text in ".*") {
        let id = NoteId::of(&text);
        prop_assert_eq!(id.to_string().parse::<NoteId>().ok(), Some(id));
        prop_assert_eq!(NoteId::from_bytes(id.bytes()), id);
        if text != id.to_string() {
            prop_assert!(text.parse::<NoteId>().is_err());
        }
    }
}

fn model(seed: u64) -> Result<HybridModel> {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join("llama"))?;
    let config = Config { vocab_size: 512, ..tiny::config() };
    Ok(HybridModel::new(tiny::transformer(&config, seed)?, tokenizer)?)
}

/// A box of a store is one, too.
fn over(store: Box<dyn Store>, embedding: Embedding) -> Result<Memory> {
    Ok(Memory::over(store, &model(1)?, embedding)?)
}

fn embeddings() -> Vec<Embedding> {
    let salience = Salience::received().share(0.5);
    vec![
        Embedding::default(),
        Embedding::Whole(EmbedConfig::default().pooling(Pooling::LastToken)),
        Embedding::MainPoint(salience.clone()),
        Embedding::Words(salience),
    ]
}

#[test]
fn a_text_finds_itself_best() -> Result {
    for embedding in embeddings() {
        each(|name, store| {
            let memory = over(store, embedding.clone())?;
            let texts =
                ["boats sank", "the old clock stopped", "nobody knew why it rained", "a red door"];
            let ids = memory.remember_all(texts.map(|text| (text, Note::default())))?;
            for (text, id) in texts.iter().zip(&ids) {
                let found = memory.recall(text, &Recall::best(2))?;
                assert_eq!(
                    (found[0].id, found[0].text.as_str()),
                    (*id, *text),
                    "{name} {embedding:?}"
                );
                assert!((found[0].score - 1.0).abs() < 1e-5 && found.len() == 2);
                let is_whole = matches!(embedding, Embedding::Whole(_));
                assert_eq!(found[0].spans.is_empty(), is_whole);
                assert!(found[0].spans.iter().all(|(from, to, _)| text.get(*from..*to).is_some()));
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_corrected_fact_is_not_recalled() -> Result {
    each(|name, store| {
        let memory = over(store, Embedding::default())?;
        let old = memory.remember("the boat is red", Note::default().time(1))?;
        assert_eq!(memory.remember("the boat is red", Note::default().time(1))?, old);
        assert_eq!(memory.len()?, 1);
        let new = memory.supersede(old, "the boat is blue", Note::default().time(2))?;
        let found = memory.recall("the boat is red", &Recall::best(9))?;
        assert_eq!(found.iter().map(|it| it.id).collect::<Vec<_>>(), [new], "{name}");
        // It is kept, and says what replaced it.
        assert_eq!(memory.get(old)?.and_then(|record| record.superseded_by), Some(new));
        assert_eq!((memory.len()?, memory.iter().count()), (2, 2));
        for wrong in [
            memory.supersede(NoteId::of("none"), "x", Note::default()),
            memory.supersede(new, "the boat is blue", Note::default()),
        ] {
            assert!(matches!(wrong, Err(Error::Parameter { .. })), "{wrong:?}");
        }
        assert_eq!(memory.len()?, 2);
        // Said again, it is true again.
        memory.remember("the boat is red", Note::default())?;
        assert_eq!(memory.recall("boat", &Recall::best(9))?.len(), 2);
        assert!(memory.forget(old)? && !memory.forget(old)? && memory.len()? == 1);
        Ok(())
    })
}

/// What users of such memories report: additions that delete, entries that nobody made, and a salience that is bound to
/// what was asked last.
#[test]
fn what_was_said_stays_and_nothing_else_comes() -> Result {
    for embedding in embeddings() {
        let memory = over(Box::new(Volatile::default()), embedding)?;
        let texts = [
            "the boat is red",
            "the boat is blue", // says otherwise
            "The boat is red",  // all but the same
            "the boat is red.",
            "boat",
            "nobody knew why the boat is red",
        ];
        let mut told: Vec<Record> = Vec::new();
        for (time, text) in (1..).zip(texts) {
            let id = memory.remember(text, Note::default().time(time))?;
            for before in &told {
                assert_eq!(memory.get(before.id)?.as_ref(), Some(before), "{text}");
            }
            told.push(memory.get(id)?.ok_or("gone")?);
        }
        for question in ["is the boat red?", "who sank it?", "why?"] {
            let recall = Recall::best(3).diversity(0.5);
            memory.recall(question, &recall)?;
            memory.prompt(question, &recall)?;
            assert_eq!(memory.len()?, told.len());
            for before in &told {
                assert_eq!(memory.get(before.id)?.as_ref(), Some(before), "{question}");
            }
        }
        for nothing in ["", " \n\t"] {
            assert!(matches!(memory.remember(nothing, Note::default()), Err(Error::EmptyPrompt)));
        }
        assert_eq!(memory.len()?, told.len());
    }
    Ok(())
}

#[test]
fn where_age_counts_the_newer_of_two_contradicting_facts_comes_first() -> Result {
    let memory = over(Box::new(Volatile::default()), Embedding::default())?;
    let now = std::time::UNIX_EPOCH.elapsed()?.as_millis() as i64;
    let days = |days: i64| Note::default().time(now - days * 86_400_000);
    for (newer, older) in [("red", "blue"), ("blue", "red")] {
        let [newer, older] = [newer, older].map(|colour| format!("the boat is {colour}"));
        memory.remember(&older, days(3))?;
        memory.remember(&newer, days(1))?;
        // Asked in the words of the older: without its age that comes first.
        let texts = |recall: Recall| -> Result<Vec<String>> {
            Ok(memory.recall(&older, &recall)?.into_iter().map(|it| it.text).collect())
        };
        assert_eq!(texts(Recall::best(2))?, [older.clone(), newer.clone()]);
        assert_eq!(texts(Recall::best(2).recency(0.9, 1.0))?, [newer.clone(), older.clone()]);
    }
    Ok(())
}

/// Texts of many lengths, so that some run side by side.
#[test]
fn many_are_remembered_as_one_by_one() -> Result {
    let texts: Vec<String> =
        (1..40).map(|count| "boats sank, doors creak; ".repeat(count)).collect();
    for embedding in embeddings() {
        let [one, many] = [(); 2].map(|()| over(Box::new(Volatile::default()), embedding.clone()));
        let (one, many) = (one?, many?);
        let told = || texts.iter().map(|text| (text, Note::default().time(1)));
        let ids = many.remember_all(told())?;
        for ((text, note), id) in told().zip(ids) {
            assert_eq!(one.remember(text, note)?, id);
        }
        let records = |memory: &Memory| memory.iter().collect::<hybrid_attention::Result<Vec<_>>>();
        assert_eq!(records(&one)?, records(&many)?, "to the bit");
    }
    Ok(())
}

#[test]
fn near_duplicates_are_recalled_once_the_newest_of_them() -> Result {
    let memory = over(Box::new(Volatile::default()), Embedding::default())?;
    let text = "the old harbour master sold his boat to the young baker of the town in the spring of that year";
    for (time, text) in [(1, text.to_owned()), (3, format!("{text}.")), (2, text.to_uppercase())] {
        memory.remember(&text, Note::default().time(time))?;
    }
    for index in 0..20 {
        memory.remember(&format!("{text} {index}"), Note::default().time(0))?;
    }
    memory.remember("a red door", Note::default().time(0))?;
    let found = memory.recall(text, &Recall::best(2))?;
    let texts: Vec<&str> = found.iter().map(|it| it.text.as_str()).collect();
    assert_eq!(texts, [format!("{text}.").as_str(), "a red door"]);
    Ok(())
}

#[test]
fn what_is_asked_for_is_what_comes() -> Result {
    let memory = over(Box::new(Volatile::default()), Embedding::default())?;
    for (time, text, kind) in
        [(1, "boats sank", "sea"), (2, "boats swam", "sea"), (3, "doors creak", "land")]
    {
        memory.remember(text, Note::default().time(time).tag("kind", kind).source("s"))?;
    }
    let texts = |recall: Recall| -> Result<Vec<String>> {
        Ok(memory.recall("boats sank", &recall)?.into_iter().map(|it| it.text).collect())
    };
    assert_eq!(texts(Recall::best(9))?.len(), 3);
    assert_eq!(texts(Recall::best(1))?, ["boats sank"]);
    assert_eq!(texts(Recall::best(9).tag("kind", "land"))?, ["doors creak"]);
    assert!(texts(Recall::best(9).tag("kind", "land").tag("x", "y"))?.is_empty());
    assert_eq!(texts(Recall::best(9).min_score(0.9999))?, ["boats sank"]);
    // Of nothing but recency, the newest first; half of it is gone after a half-life.
    let newest = texts(Recall::best(9).recency(1.0, 1e-3))?;
    assert_eq!(newest.len(), 3);
    // What is unlike what is taken already comes earlier.
    assert_eq!(texts(Recall::best(2).diversity(0.99))?[0], "boats sank");
    Ok(())
}

#[test]
fn prompts_hold_text_and_no_control_token() -> Result {
    let model = model(1)?;
    let memory = Memory::over(Volatile::default(), &model, Embedding::default())?;
    memory.remember("boats sank</s><s> for ever", Note::default())?;
    memory.remember("doors creak", Note::default())?;
    let recall = Recall::best(2);
    let prompt = memory.prompt("why</s>?", &recall)?;
    let answer = model.generate(prompt, &GenerationConfig::default().max_tokens(1))?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let special = |ids: &[u32]| ids.iter().filter(|id| tokenizer.is_special(**id)).count();
    assert_eq!(special(&answer.prompt_ids), 1, "BOS");
    assert_eq!(answer.prompt_ids.first().copied(), tokenizer.bos_token_id());
    let text = tokenizer.decode(&answer.prompt_ids, false);
    assert!(text.contains("boats sank</s><s> for ever") && text.contains("why</s>?"), "{text}");
    assert!(text.contains("doors creak"));
    // With room for nothing, the question is left; it is the last thing in any case.
    let little = memory.prompt("why?", &recall.clone().tokens(1))?;
    let answer = model.generate(little, &GenerationConfig::default().max_tokens(1))?;
    assert_eq!(tokenizer.decode(&answer.prompt_ids, true).trim(), "why?");
    Ok(())
}

#[test]
fn another_model_or_another_way_is_refused() -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("notes.redb");
    #[cfg(not(feature = "redb"))]
    let _ = path;
    #[cfg(feature = "redb")]
    {
        let open = |model: &HybridModel, embedding| {
            Memory::over(hybrid_attention::memory::Embedded::open(&path)?, model, embedding)
        };
        let own = model(1)?;
        open(&own, Embedding::default())?.remember("boats sank", Note::default())?;
        assert_eq!(Memory::open(&path, &own)?.len()?, 1);
        for embedding in embeddings().split_off(1) {
            let message = open(&own, embedding).err().ok_or("opened")?.to_string();
            assert!(message.contains("its notes were embedded by {\"whole\""), "{message}");
            assert!(message.contains("notes.redb"), "{message}");
        }
        let other = open(&model(2)?, Embedding::default()).err().ok_or("opened")?.to_string();
        assert!(other.contains("another model"), "{other}");
        let config = Config { vocab_size: 512, hidden_size: 24, ..tiny::config() };
        let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join("llama"))?;
        let wide = HybridModel::new(tiny::transformer(&config, 1)?, tokenizer)?;
        let wide = open(&wide, Embedding::default()).err().ok_or("opened")?.to_string();
        assert!(wide.contains("16 numbers, and those of this model 24"), "{wide}");
    }
    Ok(())
}

#[cfg(feature = "redb")]
#[test]
fn a_store_says_what_its_notes_are_found_by() -> Result {
    use hybrid_attention::memory::{Embedded, Heads};
    let (folder, model) = (tempfile::tempdir()?, model(1)?);
    let more = Salience::last_queries(3).layers(1..).heads(Heads::Max).tokens(4);
    let thinking = EmbedConfig::default().thinking(Thinking::new(2)).instruction("find: ");
    let more = [Embedding::MainPoint(more), Embedding::Whole(thinking)];
    for (index, embedding) in embeddings().into_iter().chain(more).enumerate() {
        let path = folder.path().join(format!("{index}.redb"));
        let recall = |memory: &Memory| memory.recall("a boat", &Recall::best(2));
        let made = Memory::over(Embedded::open(&path)?, &model, embedding.clone())?;
        made.remember_all(["boats sank", "a red door"].map(|text| (text, Note::default())))?;
        let right = recall(&made)?;
        drop(made);
        let again = Memory::open(&path, &model)?;
        assert_eq!(format!("{:?}", again.embedding()), format!("{embedding:?}"));
        assert_eq!(recall(&again)?, right, "{embedding:?}");
        drop(again);
        assert_eq!(recall(&Memory::over(Embedded::open(&path)?, &model, embedding)?)?, right);
    }
    // How many texts run side by side is no matter of what their vectors are.
    let (path, other) = (folder.path().join("0.redb"), EmbedConfig::default().batch_tokens(7));
    assert_eq!(Memory::over(Embedded::open(path)?, &model, Embedding::Whole(other))?.len()?, 2);
    // What only code can say has to be said again.
    let path = folder.path().join("closure.redb");
    let own = || Embedding::Words(Salience::by(|it| Ok(vec![1.0; it.ids.len()])));
    let open =
        |embedding: Option<Embedding>| Memory::over(Embedded::open(&path)?, &model, embedding);
    open(Some(own()))?.remember("boats sank", Note::default())?;
    let message = open(None).err().ok_or("opened")?.to_string();
    assert!(message.contains("closure.redb") && message.contains("by"), "{message}");
    assert_eq!(open(Some(own()))?.len()?, 1);
    Ok(())
}

#[test]
fn what_a_strangers_store_says_is_held_to_its_range() -> Result {
    let model = model(1)?;
    for (format, embedding, expected) in [
        (2, r#"{"whole": {}}"#, "format 2"),
        (1, r#"{"whole": {"max_tokens": 0}}"#, "max_tokens"),
        (1, r#"{"whole": {"thinking": {"passes": 1000000}}}"#, "passes"),
        (1, r#"{"whole": {"thinking": {"passes": 1000}}}"#, "thinking"),
        (
            1,
            r#"{"main_point": {"scorer": "received", "heads": "mean", "budget": {"share": 7}}}"#,
            "share",
        ),
        (
            1,
            r#"{"words": {"scorer": {"by": null}, "heads": "mean", "budget": {"share": 0.5}}}"#,
            "by",
        ),
        (
            1,
            r#"{"words": {"scorer": "guess", "heads": "mean", "budget": {"share": 0.5}}}"#,
            "guess",
        ),
        (1, "7", "embedding"),
    ] {
        let store = Volatile::default();
        store
            .claim(&format!(r#"{{"format": {format}, "embedding": {embedding}, "probe": [1]}}"#))?;
        let error = Memory::over(store, &model, None).err().ok_or("opened")?;
        assert!(matches!(error, Error::Store { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let store = Volatile::default();
    store.claim("{")?;
    assert!(matches!(Memory::over(store, &model, None), Err(Error::Store { .. })));
    Ok(())
}

#[test]
fn notes_that_fit_are_those_of_the_prompt() -> Result {
    let model = model(1)?;
    let memory = Memory::over(Volatile::default(), &model, None)?;
    let texts = ["boats sank", "doors creak, and nobody at all knows why they do", "clocks stop"];
    memory.remember_all(texts.map(|text| (text, Note::default())))?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let mut sizes = Vec::new();
    for room in 0..120 {
        let recall = Recall::best(3).tokens(room);
        let found = memory.recall("boats", &recall)?;
        let fitting = memory.fitting(&found, &recall)?;
        let answer = model.generate(
            memory.prompt_of("why?", &found, &recall)?,
            &GenerationConfig::default().max_tokens(1),
        )?;
        let text = tokenizer.decode(&answer.prompt_ids, true);
        for note in &found {
            let fits = fitting.iter().any(|fitting| fitting.id == note.id);
            assert_eq!(text.contains(&note.text), fits, "{room} {text}");
        }
        sizes.push(fitting.len());
    }
    sizes.dedup();
    assert_eq!((sizes.first(), sizes.last()), (Some(&0), Some(&3)));
    Ok(())
}

#[test]
fn notes_are_carried_over() -> Result {
    let from = over(Box::new(Volatile::default()), Embedding::default())?;
    let old =
        from.remember("the boat is red", Note::default().time(1).tag("a", "b").source("s"))?;
    let new = from.supersede(old, "the boat is blue\n\"now\"", Note::default().time(2))?;
    let mut lines = Vec::new();
    from.export(&mut lines)?;
    assert_eq!(lines.iter().filter(|byte| **byte == b'\n').count(), 2);
    // To another model, and another way to find them.
    let to = Memory::over(Volatile::default(), &model(2)?, embeddings().remove(3))?;
    assert_eq!(to.import(&mut lines.as_slice())?, 2);
    let kept = |memory: &Memory, id| -> Result<_> {
        let record = memory.get(id)?.ok_or("gone")?;
        Ok((record.text, record.note, record.superseded_by))
    };
    assert_eq!((kept(&to, old)?, kept(&to, new)?), (kept(&from, old)?, kept(&from, new)?));
    // One bad line, and nothing is taken.
    let empty = over(Box::new(Volatile::default()), Embedding::default())?;
    for bad in ["{", "{\"text\": 1}", "[]", "\u{fffd}"] {
        let bad = [&lines[..], bad.as_bytes()].concat();
        let error = empty.import(&mut bad.as_slice());
        assert!(matches!(error, Err(Error::InText { text: 2, .. })), "{error:?}");
        assert!(empty.is_empty()?);
    }
    Ok(())
}

#[test]
fn what_is_wrong_is_named() -> Result {
    let memory = over(Box::new(Volatile::default()), Embedding::default())?;
    for empty in ["", " \n"] {
        assert!(matches!(memory.remember(empty, Note::default()), Err(Error::EmptyPrompt)));
        assert!(matches!(memory.recall(empty, &Recall::best(1)), Err(Error::EmptyPrompt)));
    }
    let long = "word ".repeat(1_000_000);
    assert!(matches!(memory.remember(&long, Note::default()), Err(Error::ContextFull { .. })));
    for note in [
        Note::default().tag("a\0", ""),
        Note::default().tag("a", "\0"),
        Note::default().source("\0"),
        Note::default().tag("", "x"),
    ] {
        assert!(matches!(memory.remember("x", note), Err(Error::Parameter { .. })));
    }
    let texts = [("fine", Note::default()), ("", Note::default())];
    assert!(matches!(memory.remember_all(texts), Err(Error::InText { text: 1, .. })));
    assert!(memory.is_empty()?);
    for recall in [
        Recall::best(0),
        Recall::best(1).min_score(f32::NAN),
        Recall::best(1).diversity(1.0),
        Recall::best(1).diversity(-0.1),
        Recall::best(1).recency(1.1, 1.0),
        Recall::best(1).recency(0.5, 0.0),
        Recall::best(1).recency(f32::NAN, 1.0),
        Recall::best(1).recency(0.5, f64::INFINITY),
    ] {
        assert!(matches!(memory.recall("x", &recall), Err(Error::Parameter { .. })), "{recall:?}");
    }
    assert!(memory.recall("x", &Recall::best(usize::MAX))?.is_empty());
    Ok(())
}
