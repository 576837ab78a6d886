//! What `memory::evaluate` says of continuations and conversations: beside the model and memories, asked by hand.

mod common;

use candle_core::{D, IndexOp, Tensor};
use flashback_suite::Conversations as Suite;
use hybrid_attention::memory::evaluate::{
    Asked, Continuation, Conversations, Given, Held, Passage, Story, Told,
};
use hybrid_attention::memory::{
    Embedding, MainPoint, Memory, Note, NoteId, Recall, Salience, Volatile,
};
use hybrid_attention::model::{Batch, Pass};
use hybrid_attention::{Config, Error, HybridModel, Tokenizer};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use common::tiny;
use common::{Result, fixture};

const TEXTS: [&str; 3] = [
    "The old clock stopped; nobody at all knew why it did. The baker sold his red boat to the town in the rain.",
    "A boat sank in the harbour, and the door of the old town stood open. Nobody knew why the baker had left it so.",
    "It rained on the red door of the clock. The boat of the old baker is in the harbour, and stopped there for good.",
];

fn model() -> Result<HybridModel> {
    let config = Config { vocab_size: 512, ..tiny::config() };
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join("llama"))?;
    Ok(HybridModel::new(tiny::transformer(&config, 1)?, tokenizer)?)
}

fn passages(model: &HybridModel) -> Result<Vec<Passage>> {
    let cut = |text: &&str| Passage::cut(model, text, 24).transpose();
    let passages: Vec<Passage> =
        TEXTS.iter().filter_map(cut).collect::<hybrid_attention::Result<_>>()?;
    assert_eq!(passages.len(), TEXTS.len());
    Ok(passages)
}

/// Log-probabilities of each next token: `(tokens, vocab)`.
fn logprobs(model: &HybridModel, ids: &[u32]) -> Result<Tensor> {
    let transformer = model.transformer();
    let batch = Batch::one(ids.len())?;
    let xs = transformer.embed_ids(ids)?;
    let h = transformer.forward(&xs, transformer.all_layers(), Pass::Causal(&batch))?;
    let logits = transformer.logits(&h)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    Ok(shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?)
}

fn begin(model: &HybridModel) -> Result<(&Tokenizer, Vec<u32>)> {
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    Ok((tokenizer, tokenizer.bos_token_id().into_iter().collect()))
}

/// The loss of all but the first token of `next` behind `text`.
fn loss(model: &HybridModel, text: &str, next: &str) -> Result<f64> {
    let (tokenizer, mut ids) = begin(model)?;
    if !text.is_empty() {
        ids.extend(tokenizer.encode_said(&format!("{text}\n\n"))?);
    }
    let next = tokenizer.encode_said(next)?;
    let first = ids.len();
    ids.extend(&next);
    let logprobs = logprobs(model, &ids)?.to_vec2::<f32>()?;
    let of = |place: usize| f64::from(logprobs[first + place - 1][next[place] as usize]);
    Ok(-(1..next.len()).map(of).sum::<f64>() / (next.len() - 1) as f64)
}

fn find<'a>(rows: &'a [Given], name: &str, share: Option<f64>) -> Result<&'a Given> {
    let found = rows.iter().find(|row| row.name == name && row.share == share);
    Ok(found.ok_or_else(|| format!("no row {name} {share:?}"))?)
}

fn is_close(name: &str, ours: &[f64], right: &[f64]) {
    assert_eq!(ours.len(), right.len(), "{name}");
    for (ours, right) in ours.iter().zip(right) {
        assert!((ours - right).abs() < 1e-4, "{name}: {ours} {right}");
    }
}

#[test]
fn what_is_given_is_what_a_prompt_would_hold() -> Result {
    let model = model()?;
    let passages = passages(&model)?;
    let named = |name: &str, way| (name.to_owned(), way);
    // Chance of the first passage, in the first and the second draw.
    let ways = [
        named("received", Salience::received()),
        named("reconstruct", Salience::reconstruct()),
        named("first draw", Salience::random(0)),
        named("second draw", Salience::random(1 << 32)),
    ];
    let shares = vec![0.3, 0.6];
    let continuation = Continuation { ways: ways.clone().into(), shares, draws: 2 };
    let count = std::cell::Cell::new(0);
    let rows = continuation.run(&model, &passages, || count.set(count.get() + 1))?;
    assert_eq!((count.get(), rows.len()), (3, 2 + 2 * (3 + ways.len())));

    let tokens = |text: &str| -> Result<f64> {
        Ok(model.tokenizer().ok_or("no tokenizer")?.encode_said(text)?.len() as f64)
    };
    let by_hand = |given: &dyn Fn(&Passage) -> Result<String>| -> Result<[Vec<f64>; 2]> {
        let texts = passages.iter().map(given).collect::<Result<Vec<_>>>()?;
        let counts = texts.iter().map(|text| tokens(text)).collect::<Result<_>>()?;
        let both = texts.iter().zip(&passages);
        let losses = both.map(|(text, passage)| loss(&model, text, &passage.query));
        Ok([counts, losses.collect::<Result<_>>()?])
    };
    let whole = by_hand(&|it| Ok(it.stored.clone()))?;
    let nothing = by_hand(&|_| Ok(String::new()))?;
    for (name, [counts, losses]) in [(Continuation::WHOLE, whole), (Continuation::NOTHING, nothing)]
    {
        let row = find(&rows, name, None)?;
        assert_eq!(row.tokens, counts);
        is_close(name, &row.losses, &losses);
    }
    for share in [0.3, 0.6] {
        let lead = named("lead", Salience::lead());
        for (name, salience) in ways.iter().chain([&lead]) {
            let salience = salience.clone().share(share);
            let [counts, losses] = by_hand(&|it| {
                let point = MainPoint::of(&model, &it.stored, &salience)?;
                let words: Vec<_> = point.spans().iter().map(|it| it.text.clone()).collect();
                Ok(words.join(" "))
            })?;
            let row = find(&rows, name, Some(share))?;
            assert_eq!(row.tokens, counts, "{name} {share}");
            is_close(name, &row.losses, &losses);
        }
        let [first, second, random] = ["first draw", "second draw", Continuation::RANDOM]
            .map(|it| find(&rows, it, Some(share)));
        let mean = (first?.losses[0] + second?.losses[0]) / 2.0;
        assert!((random?.losses[0] - mean).abs() < 1e-6, "the mean of both draws");
        let idf = find(&rows, "idf", Some(share))?;
        assert!(idf.losses.iter().all(|loss| loss.is_finite()) && idf.losses.len() == 3);
    }
    Ok(())
}

/// Of texts that are the same but for one word each, the words by which they differ are the rarest.
#[test]
fn rare_words_are_those_of_few_texts() -> Result {
    let model = model()?;
    let passage = |word: &str| Passage {
        // Between brackets, so that no token is of two words.
        stored: format!("the old boat ({word}) and the old boat"),
        query: "sank in the harbour".to_owned(),
    };
    let passages = ["door", "clock", "rain"].map(passage);
    let ways = Vec::new();
    let continuation = Continuation { ways, shares: vec![0.01], draws: 1 };
    let rows = continuation.run(&model, &passages, || ())?;
    let right = ["door", "clock", "rain"].map(|word| loss(&model, word, "sank in the harbour"));
    let right = right.into_iter().collect::<Result<Vec<_>>>()?;
    is_close("idf", &find(&rows, "idf", Some(0.01))?.losses, &right);
    Ok(())
}

#[test]
fn continuations_that_cannot_be_compared_are_named() -> Result {
    let model = model()?;
    let passages = passages(&model)?;
    let none = Passage { query: String::new(), ..passages[0].clone() };
    let run = |it: Continuation, passages: &[Passage]| it.run(&model, passages, || ());
    for wrong in [
        run(Continuation::default(), &[]),
        run(Continuation::default(), &[none]),
        run(Continuation { draws: 0, ..Continuation::default() }, &passages),
        run(Continuation { shares: vec![1.5], ..Continuation::default() }, &passages),
    ] {
        assert!(matches!(wrong, Err(Error::Parameter { .. })), "{wrong:?}");
    }
    Ok(())
}

/// Stories of the suite, as the program reads them.
fn stories(count: usize) -> Result<Vec<Story>> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let story = |_| Ok(serde_json::from_str(&serde_json::to_string(&Suite::draw(&mut rng))?)?);
    (0..count).map(story).collect()
}

fn held<'a>(rows: &'a [Held], name: &str) -> Result<&'a Held> {
    Ok(rows.iter().find(|row| row.name == name).ok_or_else(|| format!("no row {name}"))?)
}

/// For each story, the shares of its questions whose note is recalled first, and at all.
fn recalled(
    model: &HybridModel,
    stories: &[Story],
    supersede: bool,
    best: usize,
) -> Result<Vec<[f64; 2]>> {
    let of_story = |story: &Story| -> Result<[f64; 2]> {
        let memory = Memory::over(Volatile::default(), model, Embedding::default())?;
        for told in &story.told {
            let old = told.corrects.map(|old| NoteId::of(&story.told[old].text));
            match old.filter(|_| supersede) {
                Some(old) => memory.supersede(old, &told.text, Note::default())?,
                None => memory.remember(&told.text, Note::default())?,
            };
        }
        let mut counts = [0.0; 2];
        for asked in &story.asked {
            let found = memory.recall(&asked.question, &Recall::best(best))?;
            let tells = |text: &str| text == story.told[asked.by].text;
            counts[0] += f64::from(u8::from(tells(&found[0].text)));
            counts[1] += f64::from(u8::from(found.iter().any(|it| tells(&it.text))));
        }
        Ok(counts.map(|count| count / story.asked.len() as f64))
    };
    stories.iter().map(of_story).collect()
}

#[test]
fn what_is_recalled_is_what_memories_recall() -> Result {
    let model = model()?;
    let stories = stories(4)?;
    let conversations = Conversations { best: 5, ..Conversations::default() };
    let count = std::cell::Cell::new(0);
    let rows = conversations.run(&model, &stories, || count.set(count.get() + 1))?;
    assert_eq!((count.get(), rows.len()), (4, 5));
    for (name, supersede) in [(Conversations::SUPERSEDED, true), (Conversations::BOTH, false)] {
        let row = held(&rows, name)?;
        let right = recalled(&model, &stories, supersede, 5)?;
        assert_eq!(row.first, right.iter().map(|it| it[0]).collect::<Vec<_>>(), "{name}");
        assert_eq!(row.recalled, right.iter().map(|it| it[1]).collect::<Vec<_>>(), "{name}");
    }
    assert_eq!(held(&rows, Conversations::SUPERSEDED)?.old_recalled, [0.0; 4]);
    for name in [Conversations::NOTHING, Conversations::ALL] {
        assert!(held(&rows, name)?.recalled.is_empty(), "none is recalled");
    }
    // Of nothing but age, the last that was told comes first, whatever is asked.
    let newest = Conversations { best: 1, recency: (1.0, 1.0) };
    let row = newest.run(&model, &stories, || ())?;
    let right = stories.iter().map(|story| {
        let of_last = story.asked.iter().filter(|asked| asked.by + 1 == story.told.len());
        of_last.count() as f64 / story.asked.len() as f64
    });
    assert_eq!(held(&row, Conversations::NEWER)?.first, right.collect::<Vec<_>>());
    Ok(())
}

/// With nothing remembered, and with all of it, the likeliest of the names is that of the model's own logits.
#[test]
fn answers_are_those_of_the_model() -> Result {
    let model = model()?;
    let stories = stories(3)?;
    let rows = Conversations::default().run(&model, &stories, || ())?;
    let (tokenizer, _) = begin(&model)?;
    for (name, all) in [(Conversations::NOTHING, false), (Conversations::ALL, true)] {
        let row = held(&rows, name)?;
        for (index, story) in stories.iter().enumerate() {
            let (mut right, mut old, mut corrected) = (0.0, 0.0, 0.0);
            for asked in &story.asked {
                let (_, mut ids) = begin(&model)?;
                for told in story.told.iter().filter(|_| all) {
                    ids.extend(tokenizer.encode_said(&format!("{}\n\n", told.text))?);
                }
                let question = format!("{}\n{}", asked.question, asked.begins);
                let said = tokenizer.encode_said(&question)?;
                ids.extend(&said);
                let last = logprobs(&model, &ids)?.i(ids.len() - 1)?.to_vec1::<f32>()?;
                let likely = |name: &str| -> Result<f32> {
                    let with = tokenizer.encode_said(&format!("{question} {name}"))?;
                    Ok(last[with[said.len()] as usize])
                };
                let own = likely(&asked.answer)?;
                let was = asked.old.as_deref().map(likely).transpose()?.unwrap_or(f32::MIN);
                let other = asked.others.iter().map(|name| likely(name));
                let other = other.collect::<Result<Vec<_>>>()?.into_iter().fold(f32::MIN, f32::max);
                right += f64::from(u8::from(own > was.max(other)));
                corrected += f64::from(u8::from(asked.old.is_some()));
                old += f64::from(u8::from(asked.old.is_some() && was > own.max(other)));
            }
            assert_eq!(row.right[index], right / story.asked.len() as f64, "{name} {index}");
            assert_eq!(row.old[index], old / corrected, "{name} {index}");
        }
        assert!(row.said.iter().chain(&row.old_said).all(|share| (0.0..=1.0).contains(share)));
        assert_eq!(row.right_corrected.len(), 3);
    }
    Ok(())
}

#[test]
fn stories_that_make_no_sense_are_named() -> Result {
    let model = model()?;
    let story = stories(1)?.remove(0);
    let told = |change: fn(&mut Told)| {
        let mut story = story.clone();
        story.told.first_mut().map(change);
        story
    };
    let asked = |change: fn(&mut Asked)| {
        let mut story = story.clone();
        story.asked.first_mut().map(change);
        story
    };
    let run = |it: &Story| Conversations::default().run(&model, std::slice::from_ref(it), || ());
    let of = |it: Conversations| it.run(&model, std::slice::from_ref(&story), || ());
    for wrong in [
        told(|it| it.corrects = Some(0)),
        told(|it| it.corrects = Some(usize::MAX)),
        told(|it| it.days_ago = -1.0),
        told(|it| it.days_ago = f64::NAN),
        asked(|it| it.by = 16),
        Story { asked: Vec::new(), ..story.clone() },
    ] {
        let wrong = run(&wrong);
        assert!(matches!(wrong, Err(Error::InText { text: 0, .. })), "{wrong:?}");
    }
    for wrong in [
        Conversations::default().run(&model, &[], || ()),
        of(Conversations { best: 0, ..Conversations::default() }),
        of(Conversations { recency: (2.0, 1.0), ..Conversations::default() }),
    ] {
        assert!(matches!(wrong, Err(Error::Parameter { .. })), "{wrong:?}");
    }
    // One in which nothing was corrected has no figure for what was.
    let none = Story {
        told: story.told.iter().map(|told| Told { corrects: None, ..told.clone() }).collect(),
        asked: story.asked.iter().map(|asked| Asked { old: None, ..asked.clone() }).collect(),
    };
    let rows = run(&none)?;
    assert!(rows.iter().all(|row| row.old.is_empty() && row.right.len() == 1));
    Ok(())
}
