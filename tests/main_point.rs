//! The main point of a text: every score against the same from whole matrices of attention weights, and what is
//! chosen by it.

mod common;

use std::ops::Range;

use candle_core::{IndexOp, Tensor};
use hybrid_attention::memory::{Heads, MainPoint, Reading, Salience};
use hybrid_attention::model::{Attended, Batch, ForwardContext, Pass, Sight, Tap};
use hybrid_attention::{Config, EmbedConfig, Error, HybridModel, Pooling, Tokenizer};
use proptest::prelude::*;

use common::tiny;
use common::{Result, assert_close, fixture};

const TEXT: &str =
    "The old harbour master's boat, the \"Mary Ann\", sank in 1952; nobody at all knew why. ";

fn model(tokenizer: &str, sliding_window: Option<usize>) -> Result<HybridModel> {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join(tokenizer))?;
    let config = Config { vocab_size: 512, sliding_window, ..tiny::config() };
    Ok(HybridModel::new(tiny::transformer(&config, 1)?, tokenizer)?)
}

/// Weights, `(queries, keys)`, keys and values.
type Head = (Vec<Vec<f32>>, Tensor, Tensor);

/// Per layer and head of the one sequence.
#[derive(Default)]
struct Whole(Vec<Vec<Head>>);

impl Tap for Whole {
    fn attention(&mut self, _: usize, attended: &Attended<'_>) -> hybrid_attention::Result<()> {
        let count = attended.mask().queries();
        let (keys, values) = attended.keys_and_values(0)?;
        let heads = (0..attended.heads()).map(|head| {
            let of = head * keys.dim(0)? / attended.heads();
            let weights = attended.weights(0, head, 0..count)?.to_vec2()?;
            Ok((weights, keys.get(of)?, values.get(of)?))
        });
        self.0.push(heads.collect::<hybrid_attention::Result<_>>()?);
        Ok(())
    }
}

fn whole(model: &HybridModel, ids: &[u32], sight: Sight) -> hybrid_attention::Result<Whole> {
    let (transformer, batch) = (model.transformer(), Batch::one(ids.len())?);
    let mut tap = Whole::default();
    let context = ForwardContext::from(Pass::uncached(&batch, sight)).tap(&mut tap);
    transformer.forward(&transformer.embed_ids(ids)?, transformer.all_layers(), context)?;
    Ok(tap)
}

/// Of each of `tokens` keys: `of_column` over the weights of `rows`, heads and layers made one.
fn by_hand(
    whole: &Whole,
    layers: Range<usize>,
    heads: Heads,
    tokens: usize,
    of_head: impl Fn(&Head, usize) -> hybrid_attention::Result<f32>,
) -> hybrid_attention::Result<Vec<f32>> {
    (0..tokens)
        .map(|key| {
            let mut sum = 0.0;
            for layer in &whole.0[layers.clone()] {
                let scores = layer.iter().map(|head| of_head(head, key));
                let scores: Vec<f32> = scores.collect::<hybrid_attention::Result<_>>()?;
                sum += match heads {
                    Heads::Mean => scores.iter().sum::<f32>() / scores.len() as f32,
                    Heads::Max => scores.iter().copied().fold(0.0, f32::max),
                } / layers.len() as f32;
            }
            Ok(sum)
        })
        .collect()
}

fn mean_of(weights: &[Vec<f32>], rows: Range<usize>, key: usize) -> f32 {
    weights[rows.clone()].iter().map(|row| row[key]).sum::<f32>() / rows.len() as f32
}

/// Scores of spans agree, and so do the spans.
fn assert_same(name: &str, model: &HybridModel, ours: &Salience, reference: Salience) -> Result {
    let ours = MainPoint::of(model, TEXT, ours)?;
    let right = MainPoint::of(model, TEXT, &reference)?;
    let places = |point: &MainPoint| -> Vec<Range<usize>> {
        point.spans().iter().map(|span| span.bytes.clone()).collect()
    };
    assert_eq!(places(&ours), places(&right), "{name}");
    for (ours, right) in ours.spans().iter().zip(right.spans()) {
        let off = (ours.score - right.score).abs();
        assert!(off <= 1e-5 * right.score.abs().max(1e-3), "{name}: {ours:?} {right:?}");
    }
    Ok(())
}

#[test]
fn scores_are_those_of_whole_matrices() -> Result {
    for (tokenizer, window) in [("llama", None), ("byte_level", None), ("llama", Some(5))] {
        let model = model(tokenizer, window)?;
        for heads in [Heads::Mean, Heads::Max] {
            for layers in [0..3, 1..2] {
                let set = |it: Salience| it.layers(layers.clone()).heads(heads).share(0.4);
                let name = format!("{tokenizer} {window:?} {heads:?} {layers:?}");
                let of = layers.clone();

                assert_same(
                    &name,
                    &model,
                    &set(Salience::received()),
                    Salience::by(move |it| {
                        let whole = whole(it.model, it.ids, Sight::Bidirectional)?;
                        let n = it.ids.len();
                        by_hand(&whole, of.clone(), heads, n, |head, key| {
                            Ok(mean_of(&head.0, 0..n, key))
                        })
                    })
                    .share(0.4),
                )?;

                let of = layers.clone();
                assert_same(
                    &name,
                    &model,
                    &set(Salience::value_weighted()),
                    Salience::by(move |it| {
                        let whole = whole(it.model, it.ids, Sight::Bidirectional)?;
                        let n = it.ids.len();
                        by_hand(&whole, of.clone(), heads, n, |head, key| {
                            let length =
                                head.2.i(key)?.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
                            Ok(mean_of(&head.0, 0..n, key) * length)
                        })
                    })
                    .share(0.4),
                )?;

                let of = layers.clone();
                assert_same(
                    &name,
                    &model,
                    &set(Salience::last_queries(4)),
                    Salience::by(move |it| {
                        let whole = whole(it.model, it.ids, Sight::Causal)?;
                        let n = it.ids.len();
                        let scores = by_hand(&whole, of.clone(), heads, n, |head, key| {
                            Ok(mean_of(&head.0, n - 4..n, key))
                        })?;
                        let near = |at: usize| &scores[at.saturating_sub(2)..(at + 3).min(n)];
                        let mean = |at| near(at).iter().sum::<f32>() / near(at).len() as f32;
                        Ok((0..n).map(mean).collect())
                    })
                    .share(0.4),
                )?;

                let of = layers.clone();
                assert_same(
                    &name,
                    &model,
                    &set(Salience::reconstruct()),
                    Salience::by(move |it| {
                        let bos = it.model.config().bos_token_id;
                        let again = it.ids.iter().filter(|id| Some(**id) != bos);
                        let twice: Vec<u32> = it.ids.iter().chain(again).copied().collect();
                        let whole = whole(it.model, &twice, Sight::Causal)?;
                        let n = it.ids.len();
                        by_hand(&whole, of.clone(), heads, n, |head, key| {
                            Ok(head.0[n..].iter().map(|row| row[key]).fold(0.0, f32::max))
                        })
                    })
                    .share(0.4),
                )?;
            }
        }
    }
    Ok(())
}

/// Leverage is blended with attention; keys that are all alike leave attention alone to decide.
#[test]
fn leverage_and_attention_both_count() -> Result {
    let model = model("llama", None)?;
    let attention = MainPoint::of(&model, TEXT, &Salience::received().share(1.0))?;
    let both = MainPoint::of(&model, TEXT, &Salience::leverage().share(1.0))?;
    assert_eq!(attention.tokens(), both.tokens());
    // Leverages lie between 0 and 1, so of the mean no more than the tokens; and never below attention's part.
    let n = TEXT.len() as f32;
    assert!(both.spans().iter().all(|span| span.score > 0.0 && span.score < 2.0 * n));
    let order = |point: &MainPoint| {
        let mut spans: Vec<_> = point.spans().iter().map(|it| (it.score, it.bytes.start)).collect();
        spans.sort_by(|a, b| b.0.total_cmp(&a.0));
        spans.into_iter().map(|(_, start)| start).collect::<Vec<_>>()
    };
    assert_ne!(order(&attention), order(&both));
    Ok(())
}

/// Words are whole, in order, and within the budget, whatever the text and the scores.
#[test]
fn spans_are_whole_words_within_the_budget() -> Result {
    let models = [model("llama", None)?, model("byte_level", None)?];
    let config = ProptestConfig::with_cases(200);
    proptest!(config, |(text in "[a-zA-Z0-9'.,!? \\n\u{e9}\u{6771}\u{4eac}\u{1f600}-]{0,60}", seed in any::<u64>(), share in 0.01f64..=1.0)| {
        for model in &models {
            tiny::holds(is_whole(model, &text, &Salience::random(seed), share))?;
            tiny::holds(is_whole(model, &text, &Salience::received(), share))?;
        }
    });
    Ok(())
}

fn is_whole(model: &HybridModel, text: &str, salience: &Salience, share: f64) -> Result {
    let point = match MainPoint::of(model, text, &salience.clone().share(share)) {
        Err(Error::EmptyPrompt) if text.trim().is_empty() => return Ok(()),
        point => point?,
    };
    let (spans, has_words) = (point.spans(), text.chars().any(char::is_alphanumeric));
    assert!(!spans.is_empty());
    assert_eq!(point.states().dims(), [point.tokens().len(), model.config().hidden_size]);
    let mut end = 0;
    for span in spans {
        assert!(span.bytes.start >= end);
        end = span.bytes.end;
        assert_eq!(span.text, text[span.bytes.clone()]);
        let letter = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if has_words {
            assert!(
                !letter(text[..span.bytes.start].chars().next_back())
                    || !letter(span.text.chars().next())
            );
            assert!(!letter(text[end..].chars().next()) || !letter(span.text.chars().next_back()));
        }
        let ends = [span.tokens.start, span.tokens.end - 1];
        assert!(ends.iter().all(|token| point.tokens().contains(token)));
    }
    assert!(point.tokens().is_sorted_by(|a, b| a < b));
    let one_word = spans.len() == 1 && !spans[0].text.contains(char::is_whitespace);
    let tokens = (point.tokens().len() as f64 / point.share()).round();
    assert!(
        !has_words || one_word || point.tokens().len() <= (share * tokens).ceil() as usize,
        "{point:?}"
    );
    Ok(())
}

/// The states are those that the tokens have in the whole text, not what they are by themselves.
#[test]
fn states_are_taken_in_their_context() -> Result {
    for (tokenizer, window) in [("llama", None), ("byte_level", Some(4))] {
        let model = model(tokenizer, window)?;
        let point = MainPoint::of(&model, TEXT, &Salience::received().share(0.3))?;
        let ids = model.tokenizer().ok_or("no tokenizer")?.encode(TEXT, true)?;
        let transformer = model.transformer();
        let batch = Batch::one(ids.len())?;
        let xs = transformer.embed_ids(&ids)?;
        let h = transformer.forward(&xs, transformer.all_layers(), Pass::Causal(&batch))?;
        let rows: Vec<u32> = point.tokens().iter().map(|token| *token as u32).collect();
        let states = transformer.norm(&h)?.index_select(&Tensor::new(rows, h.device())?, 0)?;
        assert_close(tokenizer, point.states(), &states, 0.0)?;
        let mean = states.mean(0)?;
        let length = mean.sqr()?.sum_all()?.sqrt()?;
        assert_close(tokenizer, &point.vector()?, &mean.broadcast_div(&length)?, 1e-6)?;
    }
    // Of a text whose tokens all belong to words, the vector of all is what `embed` says.
    let model = model("byte_level", None)?;
    let text = "boatssank";
    let point = MainPoint::of(&model, text, &Salience::lead().share(1.0))?;
    assert_eq!((point.text().as_str(), point.share()), (text, 1.0));
    let config = EmbedConfig::default().pooling(Pooling::Mean);
    assert_close(text, &point.vector()?, &model.embed(&[text], &config)?.i(0)?, 1e-5)
}

#[test]
fn the_first_token_and_punctuation_are_not_chosen() -> Result {
    let model = model("byte_level", None)?; // adds no BOS
    for salience in [Salience::lead(), Salience::received(), Salience::last_queries(3)] {
        let point = MainPoint::of(&model, "Ships, ships; boats!", &salience.tokens(100))?;
        assert!(point.text().contains("boats") && !point.text().contains(['!', ',', ';']));
        let few = MainPoint::of(&model, "Ships sank. Nobody knew!", &Salience::lead().tokens(1))?;
        assert!(!few.tokens().contains(&0), "{few:?}");
    }
    // Where there is no word, all there is.
    let point = MainPoint::of(&model, "?!", &Salience::received())?;
    assert_eq!((point.text().as_str(), point.share()), ("?!", 1.0));
    Ok(())
}

#[test]
fn what_is_wrong_is_named() -> Result {
    let model = model("llama", None)?;
    let error = |salience: Salience| -> Result<String> {
        let point = MainPoint::of(&model, TEXT, &salience);
        Ok(point.err().ok_or("a main point")?.to_string())
    };
    for (share, got) in [(0.0, "0"), (-1.0, "-1"), (1.5, "1.5"), (f64::NAN, "NaN")] {
        let expected = format!("parameter share: expected above 0, at most 1, got {got}");
        assert_eq!(error(Salience::lead().share(share))?, expected);
    }
    assert!(error(Salience::lead().tokens(0))?.starts_with("parameter tokens: "));
    assert!(error(Salience::last_queries(0))?.starts_with("parameter last_queries: "));
    for layers in [3..4, 1..1, 2..9, 1_000_000_000..2_000_000_000] {
        let message = error(Salience::received().layers(layers))?;
        assert!(message.starts_with("parameter salience layers: expected some of the layers 0..3"));
    }
    let short = Salience::by(|_: &Reading<'_>| Ok(vec![1.0]));
    assert!(error(short)?.starts_with("parameter salience scores: expected one for each of "));
    let nan = Salience::by(|it: &Reading<'_>| Ok(vec![f32::NAN; it.ids.len()]));
    assert!(error(nan)?.contains("salience scores"));
    let own = Salience::by(|_: &Reading<'_>| Err(Error::EmptyPrompt));
    assert_eq!(error(own)?, Error::EmptyPrompt.to_string());
    assert!(Salience::last_queries(1_000_000_000).validate().is_ok());

    let long = "word ".repeat(1_000_000);
    for salience in [Salience::received(), Salience::reconstruct(), Salience::lead()] {
        let refused = MainPoint::of(&model, &long, &salience);
        assert!(matches!(refused, Err(Error::ContextFull { .. })), "{refused:?}");
    }
    // Read twice, it is longer than the context.
    let half = "word ".repeat(600);
    assert!(MainPoint::of(&model, &half, &Salience::received()).is_ok());
    let twice = MainPoint::of(&model, &half, &Salience::reconstruct());
    assert!(matches!(twice, Err(Error::ContextFull { .. })), "{twice:?}");

    for (empty, tokenizer) in [("", "llama"), ("", "byte_level"), (" ", "llama")] {
        let refused = MainPoint::of(&self::model(tokenizer, None)?, empty, &Salience::lead());
        assert!(matches!(refused, Err(Error::EmptyPrompt)) || empty == " ", "{refused:?}");
    }
    let without = HybridModel::new(tiny::transformer(&tiny::config(), 1)?, None)?;
    let refused = MainPoint::of(&without, TEXT, &Salience::lead());
    assert!(matches!(refused, Err(Error::NoTokenizer { .. })), "{refused:?}");
    Ok(())
}
