//! Candidates: each stub is, to the last bit, the answer that its seed gives alone, as far as it came; and which are
//! dropped, and when, is what those answers say by themselves.

mod common;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use hybrid_attention::generate::{Candidates, Extract, Reason, Score, Stub};
use hybrid_attention::model::{Batch, KvPool, Pass, Transformer};
use hybrid_attention::refine::{Noise, OutputNudge};
use hybrid_attention::statistics::{Example, Fingerprint, Key, KeyConfig, Pairs, Summary, states};
use hybrid_attention::thought::EncodedBatch;
use hybrid_attention::{
    Answer, Cancel, Config, Error, GenerationConfig, HandOff, HybridModel, Prompt, StopReason,
    Thinking, TokenStream,
};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

use common::{Result, tiny};

const STORY: &str = "The coin is in the jar. The jar is in the chest. The ball is in the box.";

/// Enough to make answers of the small model differ.
fn drawn() -> GenerationConfig {
    GenerationConfig::default().thinking(Thinking::none()).temperature(2.5).seed(11).max_tokens(24)
}

/// An answer of one seed by itself, token by token.
struct Alone {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    /// The text after each token.
    texts: Vec<String>,
    /// What each token was drawn from.
    entropies: Vec<f64>,
    certainties: Vec<f64>,
    stop: StopReason,
}

impl Alone {
    fn of(
        model: &HybridModel,
        prompt: &Prompt,
        config: &GenerationConfig,
        index: usize,
    ) -> Result<Self> {
        let seed = Candidates::seed_of(config.seed.ok_or("no seed")?, index);
        let config = config.clone().seed(seed).top_logprobs(model.config().vocab_size);
        let mut stream = model.stream(prompt.clone(), &config)?;
        let (mut texts, mut text) = (Vec::new(), String::new());
        for token in &mut stream {
            text += &token?.text;
            texts.push(text.clone());
        }
        let Answer { ids, logprobs, top_logprobs, stop, .. } = stream.collect_answer()?;
        let all = |of: &[(u32, f32)]| of.iter().map(|(_, logprob)| f64::from(*logprob)).collect();
        let all: Vec<Vec<f64>> = top_logprobs.iter().map(|of| all(of)).collect();
        let entropies = all.iter().map(|all| -all.iter().map(|l| l.exp() * l).sum::<f64>());
        let certainties = all.iter().map(|all| {
            let count = all.len() as f64;
            -all.iter().sum::<f64>() / count - count.ln()
        });
        let (entropies, certainties) = (entropies.collect(), certainties.collect());
        Ok(Self { ids, logprobs, texts, entropies, certainties, stop })
    }

    /// How many tokens it has after this many steps.
    fn at(&self, tokens: usize) -> usize {
        tokens.min(self.ids.len())
    }

    fn has_ended(&self, tokens: usize) -> bool {
        tokens >= self.ids.len()
    }

    fn sum(&self, tokens: usize) -> f64 {
        self.logprobs.iter().take(tokens).map(|&logprob| f64::from(logprob)).sum()
    }

    fn mean_of(&self, values: &[f64], tokens: usize) -> f64 {
        values.iter().take(tokens).sum::<f64>() / self.at(tokens) as f64
    }
}

fn all_alone(
    model: &HybridModel,
    prompt: &Prompt,
    config: &GenerationConfig,
    count: usize,
) -> Result<Vec<Alone>> {
    (0..count).map(|index| Alone::of(model, prompt, config, index)).collect()
}

/// How many tokens it had when it was dropped, if it was, and why it is not the answer.
type Fate = (Option<usize>, Reason);

/// How a race is run, and the rules of it once more, over answers that are there as a whole.
#[derive(Clone, Debug)]
struct Rules {
    count: usize,
    keep: Option<f64>,
    every: usize,
    score: Score,
    max_tokens: usize,
}

impl Rules {
    fn candidates(&self) -> Candidates {
        let candidates = Candidates::samples(self.count).every(self.every).score(self.score);
        match self.keep {
            Some(share) => candidates.keep(share),
            None => candidates.keep_all(),
        }
    }

    fn score(&self, alone: &[Alone], inside: &[usize], index: usize, tokens: usize) -> f64 {
        let it = &alone[index];
        match self.score {
            Score::MeanLogprob => it.sum(tokens) / it.at(tokens) as f64,
            Score::SumLogprob => it.sum(tokens),
            Score::Entropy => -it.mean_of(&it.entropies, tokens),
            Score::SelfCertainty => it.mean_of(&it.certainties, tokens),
            Score::Agreement(extract) => {
                let said =
                    |index: usize| extract.find(&alone[index].texts[alone[index].at(tokens) - 1]);
                let same = inside
                    .iter()
                    .filter(|other| said(index).is_some() && said(**other) == said(index));
                same.count() as f64 / inside.len() as f64
            }
            _ => f64::NAN, // no rule of these
        }
    }

    /// The best it could still become.
    fn bound(&self, alone: &[Alone], index: usize, tokens: usize) -> f64 {
        let (it, most) = (&alone[index], self.max_tokens as f64);
        match self.score {
            Score::MeanLogprob => it.sum(tokens) / most,
            Score::SumLogprob => it.sum(tokens),
            Score::Entropy => -it.entropies.iter().take(tokens).sum::<f64>() / most,
            _ => f64::INFINITY,
        }
    }

    /// When and why each goes; the winner has no reason.
    fn fates(&self, alone: &[Alone]) -> (Vec<Option<Fate>>, usize) {
        let mut fates = vec![None; self.count];
        let mut inside: Vec<usize> = (0..self.count).collect();
        for tokens in 1.. {
            let score = |inside: &[usize], index| self.score(alone, inside, index, tokens);
            let ended = inside.iter().filter(|index| alone[**index].has_ended(tokens));
            let best = ended.map(|index| score(&inside, *index)).fold(f64::NEG_INFINITY, f64::max);
            let (out, left): (Vec<usize>, Vec<usize>) = inside.iter().partition(|index| {
                !alone[**index].has_ended(tokens) && self.bound(alone, **index, tokens) < best
            });
            out.iter().for_each(|index| fates[*index] = Some((Some(tokens), Reason::Bound)));
            inside = left;
            let decided = |inside: &[usize]| {
                inside.len() == 1 || inside.iter().all(|index| alone[*index].has_ended(tokens))
            };
            let ranked = |inside: &[usize]| {
                let mean = |index: usize| alone[index].sum(tokens) / alone[index].at(tokens) as f64;
                let mut ranked = inside.to_vec();
                ranked.sort_by(|a, b| {
                    let by_score = score(inside, *b).total_cmp(&score(inside, *a));
                    by_score.then(mean(*b).total_cmp(&mean(*a))).then(a.cmp(b))
                });
                ranked
            };
            if tokens % self.every == 0 && !decided(&inside) {
                let share = self.keep.map_or(1.0, |share| share.powi((tokens / self.every) as i32));
                let left = (self.count as f64 * share - 1e-9).ceil().max(1.0) as usize;
                let order = ranked(&inside);
                for index in order.iter().skip(left) {
                    let had = alone[*index].at(tokens);
                    fates[*index] = Some((Some(had), Reason::Outscored));
                }
                inside.retain(|index| order.iter().take(left).any(|it| it == index));
            }
            if decided(&inside) {
                let order = ranked(&inside);
                order
                    .iter()
                    .skip(1)
                    .for_each(|index| fates[*index] = Some((None, Reason::Outscored)));
                return (fates, order[0]);
            }
        }
        (fates, 0)
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Fails unless the stub is the beginning of what its seed gives alone, or all of it.
fn assert_is_alone(stub: &Stub, alone: &Alone, whole: bool) {
    let tokens = stub.ids.len();
    assert_eq!(stub.ids, alone.ids[..tokens], "{stub:?}");
    assert_eq!(bits(&stub.logprobs), bits(&alone.logprobs[..tokens]), "{}", stub.index);
    assert_eq!(stub.text, alone.texts[tokens - 1], "{}", stub.index);
    let ended = tokens == alone.ids.len();
    assert_eq!(stub.stop, ended.then_some(alone.stop), "{}", stub.index);
    assert!(ended || !whole, "{} of {}", tokens, alone.ids.len());
}

/// THE assertion: what the stubs are, and what becomes of them, is what the answers alone say.
fn check(
    model: &HybridModel,
    prompt: &Prompt,
    config: &GenerationConfig,
    rules: &Rules,
) -> Result<Answer> {
    let alone = all_alone(model, prompt, config, rules.count)?;
    let config = config.clone().candidates(rules.candidates());
    let answer = model.generate(prompt.clone(), &config)?;
    let (fates, winner) = rules.fates(&alone);
    assert_eq!(answer.candidates.len(), rules.count);
    for (index, (stub, fate)) in answer.candidates.iter().zip(&fates).enumerate() {
        assert_eq!(stub.index, index);
        let expected = fate.unwrap_or((None, Reason::Won));
        assert_eq!((stub.dropped_at, stub.reason), expected, "{rules:?}: {index}");
        assert_is_alone(stub, &alone[index], stub.dropped_at.is_none());
        assert!(stub.dropped_at.is_none_or(|at| at == stub.ids.len()), "{stub:?}");
        let (at, score) = stub.scores.last().ok_or("never judged")?;
        assert!(*at <= stub.ids.len() && stub.score() == Some(*score), "{stub:?}");
    }
    let (won, alone) = (&answer.candidates[winner], &alone[winner]);
    assert_eq!(won.reason, Reason::Won);
    assert_eq!(
        (&answer.ids, &answer.text, answer.stop),
        (&alone.ids, &alone.texts[alone.ids.len() - 1], alone.stop)
    );
    assert_eq!(bits(&answer.logprobs), bits(&alone.logprobs));
    Ok(answer)
}

const SCORES: [Score; 7] = [
    Score::MeanLogprob,
    Score::SumLogprob,
    Score::Entropy,
    Score::SelfCertainty,
    Score::Agreement(Extract::Words),
    Score::Agreement(Extract::FirstWord),
    Score::Agreement(Extract::LastNumber),
];

#[test]
fn every_score_drops_what_the_answers_alone_say() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let prompt = Prompt::from(STORY);
    let mut reasons = BTreeSet::new();
    for score in SCORES {
        for (count, keep, every) in
            [(8, Some(0.5), 3), (20, Some(0.7), 2), (5, None, 8), (3, Some(0.2), 1), (1, None, 1)]
        {
            for eos in [true, false] {
                let config = if eos { drawn().stop(".") } else { drawn().eos_ids([]) };
                let rules = Rules { count, keep, every, score, max_tokens: config.max_tokens };
                let answer = check(&model, &prompt, &config, &rules)?;
                reasons.extend(answer.candidates.iter().map(|stub| format!("{:?}", stub.reason)));
            }
        }
    }
    assert!(reasons.iter().eq(["Bound", "Outscored", "Won"]), "all of them came up: {reasons:?}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the model, its caches and the rules.
    #[test]
    fn any_race_is_what_the_answers_alone_say(
        prompt in 1usize..130, count in 1usize..19, keep in prop::option::of(0.05..0.95), every in 1usize..9,
        score in prop::sample::select(&SCORES[..4]), max_tokens in 1usize..20, seed: u64,
        window in prop::option::of(1usize..60), dtype in prop::sample::select(&[DType::F32, DType::BF16, DType::F16][..]),
        temperature in 0.5..3.0, ends in prop::collection::vec(0u32..32, 0..6),
    ) {
        let run = || -> Result {
            let config = Config { sliding_window: window, ..tiny::config() };
            let model = tiny::hybrid(&config, 4)?.with_cache_dtype(dtype)?;
            let prompt = Prompt::from(tiny::tokens(&config, seed, prompt).as_slice());
            let how = GenerationConfig::default().temperature(temperature).seed(seed);
            let how = how.max_tokens(max_tokens).eos_ids(ends.clone());
            let rules = Rules { count, keep, every, score, max_tokens };
            check(&model, &prompt, &how, &rules).map(drop)
        };
        tiny::holds(run())?;
    }
}

/// Dropping what can no longer win is no approximation: the best by the whole answer wins all the same.
#[test]
fn bounds_change_no_winner() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let (prompt, mut saved) = (Prompt::from(STORY), 0);
    for seed in 0..12 {
        let config = drawn().seed(seed).stop(".");
        let alone = all_alone(&model, &prompt, &config, 9)?;
        for score in [Score::MeanLogprob, Score::SumLogprob, Score::Entropy] {
            let rules =
                Rules { count: 9, keep: None, every: 4, score, max_tokens: config.max_tokens };
            let all: Vec<usize> = (0..9).collect();
            let whole = |index: &usize| rules.score(&alone, &all, *index, usize::MAX);
            let best = all.iter().max_by(|a, b| whole(a).total_cmp(&whole(b))).ok_or("none")?;
            let how = config.clone().candidates(rules.candidates());
            let answer = model.generate(prompt.clone(), &how)?;
            assert_eq!(answer.candidates[*best].reason, Reason::Won, "{seed} {score:?}");
            let written: usize = answer.candidates.iter().map(|stub| stub.ids.len()).sum();
            saved += alone.iter().map(|it| it.ids.len()).sum::<usize>() - written;
        }
    }
    assert!(saved > 0, "nothing was ever dropped");
    Ok(())
}

/// Numbers that stubs are judged by, beside the whole distribution that `top_logprobs` gives.
#[test]
fn entropy_and_certainty_are_those_of_the_distribution() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let (prompt, config) = (Prompt::from(STORY), drawn().eos_ids([]));
    let alone = all_alone(&model, &prompt, &config, 4)?;
    let how = config.candidates(Candidates::samples(4).keep_all().score(Score::SelfCertainty));
    let answer = model.generate(prompt, &how)?;
    for (stub, alone) in answer.candidates.iter().zip(&alone) {
        let (entropy, certainty) =
            (alone.mean_of(&alone.entropies, 24), alone.mean_of(&alone.certainties, 24));
        assert!((stub.entropy - entropy).abs() < 1e-5 * entropy, "{} {entropy}", stub.entropy);
        assert!(
            (stub.certainty - certainty).abs() < 1e-5 * certainty,
            "{} {certainty}",
            stub.certainty
        );
        assert_eq!(stub.score(), Some(stub.certainty));
    }
    Ok(())
}

/// The control draws a number for each, whatever it says.
#[test]
fn random_drops_anyone() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let candidates = Candidates::samples(4).keep(0.5).every(1).score(Score::Random);
    let mut won = [0; 4];
    for seed in 0..80 {
        let config = drawn().max_tokens(3).seed(seed).candidates(candidates.clone());
        let (answer, other) =
            (model.generate(STORY, &config)?, model.generate("The ball is in the box.", &config)?);
        let scores = |answer: &Answer| -> Vec<Option<f64>> {
            answer.candidates.iter().map(Stub::score).collect()
        };
        assert_eq!(scores(&answer), scores(&other), "it does not look at texts");
        let index = answer.candidates.iter().position(|stub| stub.reason == Reason::Won);
        won[index.ok_or("no winner")?] += 1;
    }
    // 20 each expected, with a deviation of 4
    assert!(won.iter().all(|won| (8..=32).contains(won)), "{won:?}");
    Ok(())
}

// ---- streams, functions, conversations ----

#[test]
fn the_stream_is_the_answer_and_tells_of_every_round() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let config = drawn().eos_ids([]).candidates(Candidates::samples(8).every(2));
    let answer = model.generate(STORY, &config)?;
    let told = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&told);
    let stream = model.stream(STORY, &config)?.on_candidates(move |stubs| {
        if let Ok(mut seen) = seen.lock() {
            seen.push(stubs.to_vec());
        }
    });
    let mut stream = stream;
    assert!(stream.candidates().iter().all(|stub| stub.reason == Reason::Running));
    let (mut text, mut ids) = (String::new(), Vec::new());
    while let Some(token) = stream.next() {
        let token = token?;
        text += &token.text;
        ids.push(token.id);
        assert_eq!(stream.stop().is_some(), ids.len() == 24, "{}", ids.len());
        assert!(stream.candidates().iter().any(|stub| stub.reason == Reason::Won));
    }
    assert_eq!((&text, &ids), (&answer.text, &answer.ids));
    assert_eq!(stream.candidates(), answer.candidates);
    let told = told.lock().map_err(|_| "poisoned")?;
    let racing =
        |stubs: &Vec<Stub>| stubs.iter().filter(|stub| stub.reason == Reason::Running).count();
    assert_eq!(told.iter().map(racing).collect::<Vec<_>>(), [4, 2, 1, 0], "after rounds, and won");
    assert!(stream.next().is_none());
    // Taken half from the stream, half collected.
    let mut stream = model.stream(STORY, &config)?;
    stream.by_ref().take(2).try_for_each(|token| token.map(drop))?;
    let collected = stream.collect_answer()?;
    assert_eq!((collected.ids, collected.candidates), (answer.ids, answer.candidates));
    Ok(())
}

#[test]
fn a_function_of_ones_own_decides() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let config = drawn().eos_ids([]);
    let with = |candidates| config.clone().candidates(candidates);
    for wanted in 0..6 {
        // It sees the texts as they are after the round's tokens, and chooses.
        let score = move |stub: &Stub| {
            assert!(stub.ids.len().is_multiple_of(4) && !stub.text.is_empty(), "{stub:?}");
            Ok(if stub.index == wanted { 1.0 } else { -(stub.index as f64) })
        };
        let stream = model.stream(STORY, &with(Candidates::samples(6).every(4)))?;
        let answer = stream.score_by(score)?.collect_answer()?;
        assert_eq!(answer.candidates[wanted].reason, Reason::Won);
        let alone = config.clone().seed(Candidates::seed_of(11, wanted));
        assert_eq!(answer.ids, model.generate(STORY, &alone)?.ids);
    }
    // A function has no bound: all of them are written to the end, each as alone.
    let prompt = Prompt::from(STORY);
    let how = drawn().stop(".");
    let alone = all_alone(&model, &prompt, &how, 20)?;
    let how = how.candidates(Candidates::samples(20).keep_all());
    let answer = model.stream(prompt, &how)?.score_by(|_| Ok(0.0))?.collect_answer()?;
    for (stub, alone) in answer.candidates.iter().zip(alone) {
        assert_is_alone(stub, &alone, true);
    }
    // What goes wrong in it ends the stream.
    let failing = |score: f64| -> Result<String> {
        let stream = model.stream(STORY, &with(Candidates::samples(6)))?;
        let stream = stream
            .score_by(move |_| if score == 0.0 { Err(Error::EmptyPrompt) } else { Ok(score) })?;
        Ok(stream.collect_answer().err().ok_or("it went on")?.to_string())
    };
    assert_eq!(failing(0.0)?, Error::EmptyPrompt.to_string());
    assert_eq!(failing(f64::NAN)?, "parameter score: expected a number, got NaN");
    let none = model.stream(STORY, &config)?.score_by(|_| Ok(0.0)).err().ok_or("accepted")?;
    assert!(matches!(none, Error::Parameter { name: "candidates", .. }), "{none}");
    Ok(())
}

/// The winner's cache becomes the conversation's, and what is said next needs to be read from there on alone.
#[test]
fn a_conversation_goes_on_from_the_winner() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let config = drawn().eos_ids([]).max_tokens(10);
    for candidates in [Candidates::samples(5).every(3), Candidates::samples(3).keep_all()] {
        let mut conversation = model.conversation(400)?;
        let ids = model.tokenizer().ok_or("no tokenizer")?.encode(STORY, true)?;
        let with = config.clone().candidates(candidates);
        let answer = model.stream_in(&mut conversation, ids.as_slice(), &with)?.collect_answer()?;
        assert!(conversation.ids().starts_with(&ids));
        let longer = [&ids[..], &answer.ids, &[11, 150, 12]].concat();
        let mut stream = model.stream_in(&mut conversation, longer.as_slice(), &config)?;
        let kept = stream.read_prompt()?;
        assert_eq!(
            kept,
            ids.len() + answer.ids.len() - 1,
            "all but the last token, which has not run"
        );
        let next = stream.collect_answer()?;
        let fresh = model.generate(longer.as_slice(), &config)?;
        assert_eq!(next.ids, fresh.ids);
        // A race that is given up leaves the prompt.
        let mut stream = model.stream_in(&mut conversation, ids.as_slice(), &with)?;
        stream.read_prompt()?;
        drop(stream);
        assert_eq!(conversation.ids(), ids);
    }
    Ok(())
}

// ---- thoughts ----

fn noised(hand_off: HandOff) -> Thinking {
    Thinking::new(2).span(1..3).noise(Noise::relative(0.7).seed(3)).hand_off(hand_off)
}

const HAND_OFFS: [HandOff; 3] =
    [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }];

/// A greedy answer of one candidate, by the public verbs alone.
fn by_hand(
    model: &HybridModel,
    thinking: &Thinking,
    ids: &[u32],
    candidate: u64,
    tokens: usize,
) -> Result<(Vec<u32>, Vec<f64>)> {
    let (mind, decoder) =
        (thinking.on(model.thought_model())?.candidate(candidate), model.transformer());
    let context = 0..ids.len() - 1;
    let batch = Batch::one(ids.len())?.with_context(0, std::slice::from_ref(&context))?;
    let text = EncodedBatch::new(decoder, ids, batch)?;
    let mut cache = decoder.new_cache(ids.len() + tokens)?;
    let first = mind.encode(&text, Pass::Cached(&mut cache))?;
    let thoughts = mind.think(&text, first, |_, _| ())?;
    let mut h = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?;
    let mut said = Vec::new();
    while said.len() < tokens {
        let logits = decoder.logits(&h.narrow(0, h.dim(0)? - 1, 1)?)?;
        said.extend(logits.argmax(1)?.to_vec1::<u32>()?);
        let xs = decoder.embed_ids(&said[said.len() - 1..])?;
        h = decoder.forward(&xs, decoder.all_layers(), Pass::Cached(&mut cache))?;
    }
    Ok((said, thoughts.trace.drift()))
}

#[test]
fn a_thought_is_what_its_number_gives_by_hand() -> Result {
    let config = tiny::config();
    let model = tiny::hybrid(&config, 3)?;
    let ids = tiny::tokens(&config, 6, 40);
    for hand_off in HAND_OFFS {
        let thinking = noised(hand_off);
        let plain =
            GenerationConfig::default().eos_ids([]).max_tokens(12).thinking(thinking.clone());
        let how = plain.clone().candidates(Candidates::thoughts(5).every(3));
        let answer = model.generate(ids.as_slice(), &how)?;
        let mut said = BTreeSet::new();
        for stub in &answer.candidates {
            let (whole, drift) = by_hand(&model, &thinking, &ids, stub.index as u64, 12)?;
            assert!(whole.starts_with(&stub.ids), "{hand_off:?} {}", stub.index);
            assert_eq!(stub.ids.len(), stub.dropped_at.unwrap_or(12));
            if stub.reason == Reason::Won {
                assert_eq!((&answer.ids, answer.drift()), (&whole, drift));
            }
            said.insert(whole);
        }
        assert!(said.len() > 1, "noise shook none of them");
        // The first is the answer without any of this, and others have no part in it.
        let alone = model.generate(ids.as_slice(), &plain)?;
        assert!(alone.ids.starts_with(&answer.candidates[0].ids));
        let drawn = how.temperature(1.0).seed(4);
        let (five, two) = (
            model.generate(ids.as_slice(), &drawn)?,
            model.generate(
                ids.as_slice(),
                &drawn.clone().candidates(Candidates::thoughts(2).keep_all()),
            )?,
        );
        for (of_five, of_two) in five.candidates.iter().zip(&two.candidates) {
            let both = of_five.ids.len().min(of_two.ids.len());
            assert_eq!(of_five.ids[..both], of_two.ids[..both]);
            assert_eq!(bits(&of_five.logprobs[..both]), bits(&of_two.logprobs[..both]));
        }
    }
    Ok(())
}

/// A thought that overflows is out before it says anything, and the others are as they are without it.
#[test]
fn a_thought_that_overflows_is_one_of_several() -> Result {
    let config = tiny::config();
    let model = tiny::hybrid(&config, 3)?;
    let ids = tiny::tokens(&config, 6, 20);
    let broken = |from: u64| {
        Thinking::new(1).refine_fn(move |xs, step| {
            let by =
                if step.candidate >= from { f64::INFINITY } else { 1.0 + step.candidate as f64 };
            Ok((xs * by)?)
        })
    };
    let how = GenerationConfig::default().eos_ids([]).max_tokens(6);
    let how = how.candidates(Candidates::thoughts(4).keep_all());
    let answer = |from: u64| model.generate(ids.as_slice(), &how.clone().thinking(broken(from)));
    let (all, some) = (answer(4)?, answer(2)?);
    for (index, (sound, stub)) in all.candidates.iter().zip(&some.candidates).enumerate() {
        if index < 2 {
            let both = sound.ids.len().min(stub.ids.len());
            assert_eq!(sound.ids[..both], stub.ids[..both]);
        } else {
            assert_eq!((stub.reason, stub.dropped_at), (Reason::NotFinite, Some(0)));
            assert!(stub.ids.is_empty() && stub.scores.is_empty());
        }
    }
    assert!(matches!(answer(0), Err(Error::NotFinite { what: "thoughts", .. })));
    Ok(())
}

/// The layers before the span are read once, whatever the hand-off, and the room for the others is made sure of.
#[test]
fn thoughts_share_the_layers_before_the_span() -> Result {
    let config = Config { max_position_embeddings: 600, ..tiny::config() };
    let ample = tiny::hybrid(&config, 5)?;
    let of_layer = block(&ample) / config.num_hidden_layers;
    let prompt = tiny::tokens(&config, 1, KvPool::BLOCK);
    for hand_off in HAND_OFFS {
        for (span, blocks) in [
            (0..3, 4 * 3 * 2),           // all of prompt and answer in all layers, for each
            (1..3, 1 + 4 * (1 + 2 * 2)), // the prompt once in the first, the answer for each, and both in the others
            (2..3, 2 + 4 * (2 + 2)),
        ] {
            let thinking = noised(hand_off).span(span);
            let how = GenerationConfig::default().seed(3).eos_ids([]).max_tokens(9);
            let how = how.thinking(thinking);
            let how = how.candidates(Candidates::thoughts(4).keep_all());
            let run = |model: &HybridModel| -> Result<Vec<Stub>> {
                let stream = model.stream(prompt.as_slice(), &how)?;
                Ok(stream.score_by(|stub| Ok(stub.index as f64))?.collect_answer()?.candidates)
            };
            let tight = ample.with_cache_budget(blocks * of_layer)?;
            assert_eq!(run(&tight)?, run(&ample)?);
            let tighter = ample.with_cache_budget(blocks * of_layer - 1)?;
            let refused = tighter.stream(prompt.as_slice(), &how).err();
            assert!(matches!(refused, Some(Error::PoolFull { used: 0, .. })), "{refused:?}");
        }
    }
    Ok(())
}

// ---- keys ----

/// One that explains something: outputs are made of their inputs' tokens.
fn key(model: &HybridModel, layer: usize) -> Result<Key> {
    let of = |ids: &[u32]| states(model.transformer(), ids, layer);
    let vocab = model.config().vocab_size as u32;
    let examples = (0..40u32).map(|n| {
        let input = [n % vocab, (3 * n + 1) % vocab, (n * n) % vocab, (n + 5) % vocab];
        Ok(Example { input: of(&input)?, output: of(&input[1..])? })
    });
    let config = KeyConfig { layer, pairs: vec![Pairs::Full], ..KeyConfig::default() };
    let fingerprint = Fingerprint::of(model.transformer())?;
    Ok(Key::fit(&examples.collect::<Result<Vec<_>>>()?, &config, fingerprint)?)
}

#[test]
fn a_key_ranks_by_what_it_expects() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let ids = model.tokenizer().ok_or("no tokenizer")?.encode(STORY, true)?;
    for layer in [0, 2] {
        let key = key(&model, layer)?.insist();
        let of = |ids: &[u32], pairs| Summary::of(&states(model.transformer(), ids, layer)?, pairs);
        let intended = key.intended(&of(&ids, key.pairs())?)?;
        let config = drawn().max_tokens(9).stop_id(44);
        let alone = all_alone(&model, &Prompt::from(STORY), &config, 6)?;
        let candidates = Candidates::samples(6).every(3).keep_all().score(Score::Key);
        let how = config.clone().candidates(candidates.clone());
        let answer = model.stream(STORY, &how)?.key(&key)?.collect_answer()?;
        let deviation = |it: &Alone, tokens: usize| -> Result<f64> {
            let ended =
                tokens >= it.ids.len() && matches!(it.stop, StopReason::Eos | StopReason::StopId);
            let ids = &it.ids[..it.at(tokens) - usize::from(ended)];
            if ids.len() < 2 {
                return Ok(f64::INFINITY);
            }
            Ok(intended.deviation(&of(ids, Pairs::Full)?)?)
        };
        let mut best = (f64::INFINITY, 0);
        for (stub, alone) in answer.candidates.iter().zip(&alone) {
            assert_is_alone(stub, alone, true);
            for (tokens, score) in &stub.scores {
                assert_eq!(-score, deviation(alone, *tokens)?, "{} at {tokens}", stub.index);
            }
            let last = deviation(alone, usize::MAX)?;
            assert_eq!(stub.deviation, Some(last).filter(|it| it.is_finite()));
            best = if last < best.0 { (last, stub.index) } else { best };
        }
        assert_eq!(answer.candidates[best.1].reason, Reason::Won);

        // All of it ends with the first that is near enough.
        let mut all = Vec::new();
        for tokens in [3, 6] {
            for it in &alone {
                all.push(deviation(it, tokens)?);
            }
        }
        all.sort_by(f64::total_cmp);
        for within in [all[0], all[all.len() / 3]] {
            let how = config.clone().candidates(candidates.clone().within(within));
            let answer = model.stream(STORY, &how)?.key(&key)?.collect_answer()?;
            let mut expected = None;
            for tokens in [3, 6] {
                for (index, it) in alone.iter().enumerate() {
                    let is = deviation(it, tokens)?;
                    let better = expected.is_none_or(|(at, best, _)| at == tokens && is < best);
                    if is <= within && better {
                        expected = Some((tokens, is, index));
                    }
                }
            }
            let (tokens, _, index) = expected.ok_or("none is near enough")?;
            let (won, alone) = (&answer.candidates[index], &alone[index]);
            assert_eq!((won.reason, &won.ids), (Reason::Won, &answer.ids));
            assert_eq!(answer.ids, alone.ids[..alone.at(tokens)]);
            let stop = if alone.has_ended(tokens) { alone.stop } else { StopReason::Intended };
            assert_eq!((answer.stop, won.stop), (stop, Some(stop)));
        }
        // One alone ends by it, too.
        let within = deviation(&alone[0], 6)?;
        let one = Candidates::samples(1).every(3).within(within);
        let answer = model.stream(STORY, &config.candidates(one))?.key(&key)?.collect_answer()?;
        let tokens = if deviation(&alone[0], 3)? <= within { 3 } else { 6 };
        assert_eq!(answer.ids, alone[0].ids[..alone[0].at(tokens)]);
    }
    Ok(())
}

#[test]
fn keys_that_cannot_be_used_are_refused() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let key = key(&model, 0)?;
    let refused = |stream: hybrid_attention::Result<TokenStream<'_>>| -> Result<String> {
        Ok(stream.and_then(TokenStream::collect_answer).err().ok_or("accepted")?.to_string())
    };
    let by_key = drawn().candidates(Candidates::samples(2).score(Score::Key));
    for config in [&by_key, &drawn().candidates(Candidates::samples(2).within(1.0))] {
        let error = refused(model.stream(STORY, config))?;
        assert_eq!(error, "parameter key: expected one, given by TokenStream::key, got none");
    }
    for within in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let config = drawn().candidates(Candidates::samples(2).within(within));
        assert!(
            refused(model.stream(STORY, &config))?
                .starts_with("parameter within: expected above 0")
        );
    }
    assert!(
        refused(model.stream(STORY, &drawn())?.key(&key))?.starts_with("parameter candidates: ")
    );
    assert!(
        refused(model.stream([11], &by_key)?.key(&key.clone().insist()))?.starts_with("parameter ")
    );
    // Of another model, and one that knows nothing.
    let other = tiny::hybrid(&Config { hidden_size: 128, ..tiny::config() }, 3)?;
    let error = refused(other.stream([1, 2, 3], &by_key)?.key(&key.insist()))?;
    assert!(error.starts_with("parameter key: expected one of this model, got "), "{error}");
    let of = |ids: &[u32]| states(model.transformer(), ids, 0);
    let unrelated = (0..20u64).map(|n| {
        let tokens = |seed| tiny::tokens(model.config(), seed, 6);
        Ok(Example { input: of(&tokens(n))?, output: of(&tokens(1000 - n))? })
    });
    let unrelated = unrelated.collect::<Result<Vec<_>>>()?;
    let fingerprint = Fingerprint::of(model.transformer())?;
    let nothing = Key::fit(
        &unrelated,
        &KeyConfig { pairs: vec![Pairs::Full], ..KeyConfig::default() },
        fingerprint,
    )?;
    assert!(nothing.declines(), "{} {}", nothing.mean_r2(), nothing.variance_r2());
    let error = refused(model.stream(STORY, &by_key)?.key(&nothing))?;
    assert!(error.starts_with("parameter key: expected one that explains some"), "{error}");
    model.stream(STORY, &by_key)?.key(&nothing.insist())?.collect_answer()?;
    Ok(())
}

// ---- memory ----

/// Bytes of a block in all layers.
fn block(model: &HybridModel) -> usize {
    let config = model.config();
    2 * config.num_key_value_heads * KvPool::BLOCK * config.head_dim * 4 * config.num_hidden_layers
}

#[test]
fn room_is_made_sure_of_before_anything_runs() -> Result {
    let config = Config { max_position_embeddings: 600, ..tiny::config() };
    let ample = tiny::hybrid(&config, 5)?;
    let (block, positions) = (block(&ample), KvPool::BLOCK);
    let how = GenerationConfig::default().temperature(1.0).seed(3).eos_ids([]);
    // Prompt and answer in blocks: of the prompt, and of each from the prompt's last one on.
    for (prompt, new, candidates, blocks) in [
        (positions, 10, Candidates::samples(6).keep_all(), 1 + 6),
        (positions - 4, 4, Candidates::samples(6).keep_all(), 1 + 6),
        (positions - 4, 20, Candidates::samples(6).keep_all(), 1 + 2 * 6),
        (2 * positions + 1, 2, Candidates::samples(3).keep_all(), 3 + 3),
        // Half of them are gone before the second block is begun.
        (positions - 8, 20, Candidates::samples(8).keep(0.5).every(4), 1 + 8),
        (positions - 2, 20, Candidates::samples(8).keep(0.5).every(4), 1 + 2 * 8),
        (positions - 8, 200, Candidates::samples(40).keep(0.1).every(8), 1 + 40),
    ] {
        let prompt = tiny::tokens(&config, 1, prompt);
        let how = how.clone().max_tokens(new).candidates(candidates.clone());
        let run = |model: &HybridModel| -> Result<Option<Answer>> {
            let stream = match model.stream(prompt.as_slice(), &how) {
                Err(Error::PoolFull { .. }) => return Ok(None),
                stream => stream?,
            };
            Ok(Some(stream.score_by(|stub| Ok(f64::from(stub.ids[0])))?.collect_answer()?))
        };
        let expected = run(&ample)?.ok_or("no room")?;
        let tight = ample.with_cache_budget(blocks * block)?;
        let got = run(&tight)?.ok_or("no room where there is enough")?;
        assert_eq!((got.ids, got.candidates), (expected.ids, expected.candidates));
        assert!(run(&ample.with_cache_budget(blocks * block - 1)?)?.is_none(), "{candidates:?}");
    }
    Ok(())
}

/// Blocks are free as soon as a stub is dropped, and all of them when the answer is there.
#[test]
fn what_is_dropped_frees_its_blocks() -> Result {
    let config = Config { max_position_embeddings: 600, ..tiny::config() };
    let model = tiny::hybrid(&config, 5)?.with_cache_budget(1 << 24)?;
    let pool = model.conversation(8)?.cache().pool().clone();
    let block = block(&model);
    let prompt = tiny::tokens(&config, 1, KvPool::BLOCK);
    let how = GenerationConfig::default().temperature(1.0).seed(3).eos_ids([]).max_tokens(20);
    let how = how.candidates(Candidates::samples(16).every(4));
    let used = Arc::new(Mutex::new(Vec::new()));
    let (seen, of) = (Arc::clone(&used), pool.clone());
    let stream = model.stream(prompt.as_slice(), &how)?.on_candidates(move |_| {
        if let Ok(mut seen) = seen.lock() {
            seen.push(of.used_bytes() / block);
        }
    });
    let answer = stream.collect_answer()?;
    assert_eq!(answer.candidates.len(), 16);
    let used = used.lock().map_err(|_| "poisoned")?;
    // The prompt's block, and one for each that is left.
    assert_eq!(used.as_slice(), [1 + 8, 1 + 4, 1 + 2, 1 + 1, 1 + 1]);
    assert_eq!(pool.used_bytes(), 0);
    Ok(())
}

// ---- what goes wrong ----

#[test]
fn bad_settings_are_refused_by_name() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let plain = drawn();
    let with = |candidates| plain.clone().candidates(candidates);
    let passes = || Thinking::new(1).span(1..3);
    let thinking = |thinking| with(Candidates::samples(2)).thinking(thinking);
    for (config, expected) in [
        (with(Candidates::samples(0)), "candidates: expected 1 to 1024, got 0"),
        (
            with(Candidates::samples(1_000_000_000)),
            "candidates: expected 1 to 1024, got 1000000000",
        ),
        (with(Candidates::samples(2).keep(0.0)), "keep: expected a share within (0, 1), got 0"),
        (with(Candidates::samples(2).keep(1.0)), "keep: expected a share within (0, 1), got 1"),
        (with(Candidates::samples(2).keep(-3.5)), "keep: expected a share within (0, 1), got -3.5"),
        (
            with(Candidates::samples(2).keep(f64::NAN)),
            "keep: expected a share within (0, 1), got NaN",
        ),
        (with(Candidates::samples(2).every(0)), "every: expected at least 1 token, got 0"),
        (
            with(Candidates::samples(2)).temperature(0.0),
            "temperature: expected above 0 for candidates that are samples, got 0",
        ),
        (
            with(Candidates::samples(2)).max_tokens(0),
            "max_tokens: expected at least 1 for candidates, got 0",
        ),
        (
            thinking(passes().rethink_every(4)),
            "candidates: expected thinking that does not think again, got rethink_every 4",
        ),
        (
            thinking(Thinking::none().output_nudge(OutputNudge::new(2))),
            "candidates: expected thinking without an output nudge, got output_nudge",
        ),
        (
            with(Candidates::thoughts(2)).thinking(Thinking::none()),
            "candidates: expected at least one pass for candidates that are thoughts, got 0",
        ),
        (
            with(Candidates::thoughts(2)).thinking(passes()),
            "candidates: expected thinking with noise for candidates that are thoughts, got none",
        ),
        (
            with(Candidates::thoughts(2)).thinking(passes().noise(Noise::relative(-0.1))),
            "sd: expected a number in [0, 1e6], got -0.1",
        ),
        (
            with(Candidates::thoughts(2)).thinking(passes().noise(Noise::relative(f64::NAN))),
            "sd: expected a number in [0, 1e6], got NaN",
        ),
    ] {
        let error = model.generate(STORY, &config).err().ok_or("accepted")?.to_string();
        assert_eq!(error, format!("parameter {expected}"));
    }
    let many =
        model.generate_many([STORY], &with(Candidates::samples(2))).err().ok_or("accepted")?;
    assert!(matches!(many, Error::Parameter { name: "candidates", .. }), "{many}");
    // One sample may be greedy: it is the answer.
    let one = with(Candidates::samples(1)).temperature(0.0);
    assert_eq!(
        model.generate(STORY, &one)?.ids,
        model.generate(STORY, &plain.temperature(0.0))?.ids
    );
    // As many as may be, over a short answer.
    let most = drawn().max_tokens(2).candidates(Candidates::samples(Candidates::MOST).every(1));
    assert_eq!(model.generate("The coin", &most)?.candidates.len(), Candidates::MOST);
    Ok(())
}

/// Stubs whose numbers overflow go, and the others are what they are alone; only if all go is it an error.
#[test]
fn numbers_that_overflow_are_those_of_one_stub() -> Result {
    let config = tiny::config();
    let weights = tiny::weights(&config, 6)?;
    let sound = HybridModel::new(Transformer::new(&config, &mut weights.clone())?, None)?;
    let prompt = Prompt::from(tiny::tokens(&config, 2, 9).as_slice());
    let how = GenerationConfig::default().temperature(1.5).seed(5).eos_ids([]).max_tokens(12);
    let alone = all_alone(&sound, &prompt, &how, 8)?;
    // A token that some of them say, and others do not.
    let says = |id: u32| alone.iter().filter(|it| it.ids[..11].contains(&id)).count();
    let id = (0..32).find(|id| (2..7).contains(&says(*id))).ok_or("no such token")?;
    let model = |broken: &[u32]| -> Result<HybridModel> {
        let table = "model.embed_tokens.weight";
        let mut rows: Vec<Vec<f32>> = weights[table].to_vec2()?;
        broken.iter().for_each(|id| rows[*id as usize].fill(f32::INFINITY));
        let mut weights = weights.clone();
        weights.insert(table.into(), Tensor::new(rows, &Device::Cpu)?);
        Ok(HybridModel::new(Transformer::new(&config, &mut weights)?, None)?)
    };
    let how = how.candidates(Candidates::samples(8).keep_all().score(Score::SelfCertainty));
    let answer = model(&[id])?.generate(prompt.clone(), &how)?;
    for (stub, alone) in answer.candidates.iter().zip(&alone) {
        let said = alone.ids[..11].iter().position(|it| *it == id).map(|at| at + 1);
        assert_eq!((stub.reason == Reason::NotFinite).then_some(stub.ids.len()), said, "{stub:?}");
        assert_eq!(stub.dropped_at, said);
        assert_is_alone(stub, alone, said.is_none());
    }
    let all: Vec<u32> = alone.iter().map(|it| it.ids[0]).collect();
    let unprompted: Vec<u32> = tiny::tokens(&config, 2, 9);
    let all: Vec<u32> = all.into_iter().filter(|id| !unprompted.contains(id)).collect();
    if all.len() == 8 {
        let error = model(&all)?.generate(prompt, &how).err().ok_or("it went on")?;
        assert!(matches!(error, Error::NotFinite { what: "logits", .. }), "{error}");
    }
    Ok(())
}

#[test]
fn a_race_can_be_cancelled() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let config = drawn().candidates(Candidates::samples(6));
    let cancel = Cancel::default();
    let mut stream = model.stream(STORY, &config)?.cancel(cancel.clone());
    stream.read_prompt()?;
    cancel.cancel();
    assert!(matches!(stream.next(), Some(Err(Error::Cancelled))));
    assert!(stream.next().is_none());
    // While it goes on: whoever is told of a round stops it.
    let cancel = Cancel::default();
    let stream = model.stream(STORY, &config)?.cancel(cancel.clone());
    let stream = stream.on_candidates(move |_| cancel.cancel());
    assert!(matches!(stream.collect_answer(), Err(Error::Cancelled)));
    Ok(())
}

// ---- seeds, threads, and without any of it ----

#[test]
fn the_same_seed_gives_the_same_stubs_in_any_pool_of_threads() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let config = drawn().candidates(Candidates::samples(19).every(3).score(Score::Entropy));
    let expected = model.generate(STORY, &config)?;
    for threads in [1, 2, 3, 7] {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
        let got = pool.install(|| model.generate(STORY, &config))?;
        assert_eq!((&got.ids, &got.candidates), (&expected.ids, &expected.candidates));
    }
    let seeds = |config: &GenerationConfig| -> Result<Vec<u64>> {
        Ok(model.generate(STORY, config)?.candidates.iter().map(|stub| stub.seed).collect())
    };
    let all = seeds(&config)?;
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 19);
    // Without a seed another one is drawn each time, and told.
    let mut unseeded = config;
    unseeded.seed = None;
    assert_ne!(seeds(&unseeded)?, seeds(&unseeded)?);
    Ok(())
}

#[test]
fn without_candidates_there_is_no_trace_of_them() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let answer = model.generate(STORY, &drawn())?;
    assert!(answer.candidates.is_empty());
    let json = serde_json::to_value(&answer)?;
    assert!(json.get("candidates").is_none(), "{json}");
    let with = model.generate(STORY, &drawn().candidates(Candidates::samples(2)))?;
    let json = serde_json::to_value(&with)?;
    let won =
        json["candidates"].as_array().and_then(|all| all.iter().find(|it| it["reason"] == "won"));
    assert_eq!(won.ok_or("no winner")?["text"], json["text"]);
    Ok(())
}
