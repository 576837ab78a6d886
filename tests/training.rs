//! Gradients through the whole method, as training takes them: encode, thought passes, refinement,
//! hand-off, causal reading, with every weight a variable.

mod common;

use std::collections::{BTreeMap, HashMap};

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::ops::log_softmax;
use hybrid_attention::model::{Batch, KvCache, Pass, Sight};
use hybrid_attention::refine::{Anchor, CosineReweight, Interpolate, Seq, Step, seq};
use hybrid_attention::thought::{EncodedBatch, HandOff, ThoughtModel, Thoughts, Trace};
use hybrid_attention::{Config, Error, Thinking};

use common::gradient::scalar;
use common::tiny;
use common::{Result, assert_close, assert_identical};

type Weights = BTreeMap<String, Tensor>;

const SPAN: std::ops::Range<usize> = 1..2;

/// Half the distance between the two points of a central difference, for directions of length 1
/// and for single entries.
const STEP: f64 = 1e-2;

/// Three layers, of which the middle one thinks; grouped heads.
fn config(tied: bool, window: Option<usize>) -> Config {
    Config { tie_word_embeddings: tied, sliding_window: window, ..tiny::config() }
}

/// The model's weights, one thought layer and a gate.
fn weights(config: &Config, seed: u64) -> Result<Weights> {
    let four = Config { num_hidden_layers: 4, ..config.clone() };
    let mut weights = Weights::new();
    for (name, tensor) in tiny::weights(&four, seed)? {
        weights.insert(name.replace("model.layers.3.", "thought.layers.0."), tensor);
    }
    weights.insert("thought.gate".into(), tiny::noise(seed, &[config.hidden_size], 1.0)?);
    Ok(weights)
}

fn model(config: &Config, weights: &Weights) -> Result<ThoughtModel> {
    let mut weights: HashMap<_, _> = weights.clone().into_iter().collect();
    Ok(ThoughtModel::new(config, &mut weights)?)
}

/// The same weights as variables: those to ask for gradients, and those to build a model of.
fn variables(weights: &Weights) -> Result<(BTreeMap<String, Var>, Weights)> {
    let mut vars = BTreeMap::new();
    for (name, tensor) in weights {
        vars.insert(name.clone(), Var::from_tensor(tensor)?);
    }
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
    let tensors = tensors.collect();
    Ok((vars, tensors))
}

/// Two sequences of different length, each context and then plain, the longer with plain tokens between
/// two segments.
fn batch() -> Result<Batch> {
    let batch = Batch::ragged(&[11, 8])?;
    Ok(batch.with_context(0, &[0..3, 4..7])?.with_context(1, &[1..3, 3..4])?)
}

/// The mean cross entropy of each plain token's successor.
fn loss(model: &ThoughtModel, text: &EncodedBatch, hidden: &Tensor) -> Result<Tensor> {
    let (batch, thinks) = (text.batch(), text.batch().thinks());
    let logprobs = log_softmax(&model.decoder().logits(hidden)?, D::Minus1)?;
    let mut losses = Vec::new();
    for rows in batch.all_rows() {
        for (row, thinks) in rows.clone().zip(&thinks[rows.clone()]).take(rows.len() - 1) {
            if *thinks == 0 {
                losses.push(logprobs.get(row)?.get(text.ids()[row + 1] as usize)?);
            }
        }
    }
    Ok(Tensor::stack(&losses, 0)?.mean_all()?.neg()?)
}

/// How one text is run.
#[derive(Debug)]
struct Run {
    config: Config,
    thinking: Thinking,
    cached: bool,
}

impl Run {
    fn text(&self, model: &ThoughtModel) -> Result<EncodedBatch> {
        tiny::text(model.decoder(), &batch()?, 9)
    }

    /// A cache for each sequence.
    fn caches(&self, model: &ThoughtModel) -> Result<Vec<KvCache>> {
        (0..2).map(|_| Ok(model.decoder().new_cache(16)?)).collect()
    }

    fn pass<'a>(&self, batch: &'a Batch, caches: &'a mut [KvCache]) -> Pass<'a> {
        match self.cached {
            true => {
                let caches = caches.iter_mut().collect();
                Pass::Remembered { batch, sight: Sight::Causal, caches }
            }
            false => Pass::Causal(batch),
        }
    }

    /// From the embeddings to the loss.
    fn loss(&self, model: &ThoughtModel) -> Result<Tensor> {
        let text = self.text(model)?;
        let mut caches = self.caches(model)?;
        let z = self.thinking.on(model)?.encode(&text, self.pass(text.batch(), &mut caches))?;
        self.loss_from(model, &text, z, &mut caches)
    }

    /// The same with the embeddings given.
    fn loss_of_embeddings(&self, model: &ThoughtModel, xs: &Tensor) -> Result<Tensor> {
        let text = self.text(model)?;
        let mut caches = self.caches(model)?;
        let pass = self.pass(text.batch(), &mut caches);
        let z = model.decoder().forward(xs, 0..SPAN.start, pass)?;
        self.loss_from(model, &text, z, &mut caches)
    }

    fn loss_from(
        &self,
        model: &ThoughtModel,
        text: &EncodedBatch,
        z: Tensor,
        caches: &mut [KvCache],
    ) -> Result<Tensor> {
        let mind = self.thinking.on(model)?;
        let thoughts = mind.think(text, z, |_, _| ())?;
        let pass = self.pass(text.batch(), caches);
        loss(model, text, &mind.hand_off(text, &thoughts, pass)?)
    }
}

/// Every hand-off, sight, window, head, with and without a cache, under refinements in turn.
fn runs() -> Vec<Run> {
    let refinements: [Seq; 3] = [
        Interpolate::gated().into(),
        seq().add(CosineReweight::mix(0.3)).add(Interpolate::damped()),
        Interpolate::gated().anchor(Anchor::FirstPass, 0.2).into(),
    ];
    let hand_offs = [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }];
    let mut runs = Vec::new();
    for (hand_off_at, hand_off) in hand_offs.into_iter().enumerate() {
        for (sight_at, sight) in [Sight::Bidirectional, Sight::Causal].into_iter().enumerate() {
            for cached in [false, true] {
                let turn = hand_off_at + sight_at + usize::from(cached);
                let window = [None, Some(4)][turn % 2];
                let thinking = Thinking::new(2 + turn % 2).span(SPAN).sight(sight);
                let thinking = thinking.hand_off(hand_off).refine(refinements[turn % 3].clone());
                let config = config((hand_off_at + sight_at) % 2 == 0, window);
                runs.push(Run { config, thinking, cached });
            }
        }
    }
    runs
}

/// Fails unless `gradient` is the slope of `at` in its own direction, a random one, and along two
/// single entries.
fn check_slopes(
    name: &str,
    x: &Tensor,
    gradient: &Tensor,
    at: impl Fn(&Tensor) -> Result<f64>,
) -> Result {
    let norm = scalar(&gradient.sqr()?)?.sqrt();
    assert!(norm > 1e-4, "{name}: the gradient vanishes, {norm}");
    let count = x.elem_count();
    let entry = |at: usize| -> Result<Tensor> {
        let values = (0..count).map(|index| f32::from(u8::from(index == at))).collect::<Vec<_>>();
        Ok(Tensor::from_vec(values, x.dims(), &Device::Cpu)?)
    };
    let random = tiny::noise(3, x.dims(), 1.0 / (count as f32).sqrt())?;
    let directions = [(gradient / norm)?, random, entry(count / 3)?, entry(count - 1)?];
    for (index, direction) in directions.iter().enumerate() {
        let moved = |step: f64| at(&(x + (direction * step)?)?);
        let slope = (moved(STEP)? - moved(-STEP)?) / (2.0 * STEP);
        let expected = scalar(&(gradient * direction)?)?;
        let off = (slope - expected).abs();
        let within = 0.01 * norm + 5e-5; // a loss of 3 is known to about 1e-7
        assert!(off < within, "{name}, direction {index}: slope {slope}, gradient {expected}");
    }
    Ok(())
}

/// What the loss and the gradients of every variable are.
fn gradients(run: &Run, tensors: &Weights) -> Result<(f64, GradStore)> {
    let loss = run.loss(&model(&run.config, tensors)?)?;
    Ok((scalar(&loss)?, loss.backward()?))
}

fn gradient(of: &GradStore, name: &str, var: &Var) -> Result<Tensor> {
    Ok(of.get(var).ok_or_else(|| format!("no gradient of {name}"))?.detach())
}

/// Whether a run takes this weight into account.
fn matters(run: &Run, name: &str) -> bool {
    name != "thought.gate" || format!("{:?}", run.thinking).contains("Gate")
}

#[test]
fn every_weight_learns_what_central_differences_say() -> Result {
    for (index, run) in runs().into_iter().enumerate() {
        let weights = weights(&run.config, 21 + index as u64)?;
        let (vars, tensors) = variables(&weights)?;
        let (value, store) = gradients(&run, &tensors)?;
        let plain = scalar(&run.loss(&model(&run.config, &weights)?)?)?;
        assert!((value - plain).abs() < 1e-5, "{run:?}: {value} with a graph, {plain} without");
        for (name, var) in &vars {
            if !matters(&run, name) {
                continue;
            }
            let name_of_run = format!("{name} in {run:?}");
            check_slopes(&name_of_run, &weights[name], &gradient(&store, name, var)?, |moved| {
                let mut weights = weights.clone();
                weights.insert(name.clone(), moved.clone());
                scalar(&run.loss(&model(&run.config, &weights)?)?)
            })?;
        }
    }
    Ok(())
}

/// With frozen weights, as when only the input is trained.
#[test]
fn the_input_embeddings_learn_what_central_differences_say() -> Result {
    for (index, run) in runs().into_iter().enumerate() {
        let weights = weights(&run.config, 41 + index as u64)?;
        let model = model(&run.config, &weights)?;
        let xs = run.text(&model)?.embeddings().clone();
        let var = Var::from_tensor(&xs)?;
        let store = run.loss_of_embeddings(&model, var.as_tensor())?.backward()?;
        let gradient = gradient(&store, "the embeddings", &var)?;
        check_slopes(&format!("{run:?}"), &xs, &gradient, |xs| {
            scalar(&run.loss_of_embeddings(&model, xs)?)
        })?;
    }
    Ok(())
}

fn run(thinking: Thinking) -> Run {
    Run { config: config(false, None), thinking: thinking.span(SPAN), cached: false }
}

/// Each pass by hand; what thinks is cut off from what came before in all but the last `k`.
fn loss_by_hand(run: &Run, model: &ThoughtModel, refine: &Seq, k: usize) -> Result<Tensor> {
    const PASSES: usize = 3;
    let text = run.text(model)?;
    let mind = run.thinking.on(model)?;
    let first = mind.encode(&text, Pass::Causal(text.batch()))?;
    let thinks = Tensor::new(text.batch().thinks(), first.device())?.unsqueeze(1)?;
    let thinks = thinks.broadcast_as(first.shape())?;
    let (mut z, mut first_h) = (first.clone(), None);
    for index in 0..PASSES {
        if index > 0 && index <= PASSES.saturating_sub(k) {
            z = thinks.where_cond(&z.detach(), &first)?;
        }
        let h = mind.think_once(&z, text.batch())?;
        let after_first: &Tensor =
            first_h.get_or_insert_with(|| if k < PASSES { h.detach() } else { h.clone() });
        let step = Step {
            first: &first,
            first_h: after_first,
            index,
            passes: PASSES,
            gate: model.thought_gate(),
            ..Step::new(&z, &h, text.batch())
        };
        z = refine.refine(&step)?;
    }
    let thoughts = Thoughts { z, first, trace: Trace::default(), origin: None };
    loss(model, &text, &mind.hand_off(&text, &thoughts, Pass::Causal(text.batch()))?)
}

#[test]
fn truncated_gradients_are_those_of_a_loop_cut_by_hand() -> Result {
    for hand_off in [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }] {
        let refine: Seq = Interpolate::gated().anchor(Anchor::FirstPass, 0.3).into();
        let thinking = Thinking::new(3).hand_off(hand_off).refine(refine.clone());
        let weights = weights(&config(false, None), 61)?;
        let (vars, tensors) = variables(&weights)?;
        let (whole, full) = gradients(&run(thinking.clone()), &tensors)?;
        for k in 1..6 {
            let run = run(thinking.clone().gradient_passes(k));
            let (value, got) = gradients(&run, &tensors)?;
            assert_eq!(value, whole, "a thought has changed");
            let model = model(&run.config, &tensors)?;
            let expected = loss_by_hand(&run, &model, &refine, k)?.backward()?;
            for (name, var) in &vars {
                let what = format!("{name}, last {k}, {hand_off:?}");
                let got = gradient(&got, name, var)?;
                assert_close(&what, &got, &gradient(&expected, name, var)?, 1e-4)?;
                let full = gradient(&full, name, var)?;
                if k >= 3 {
                    assert_identical(&what, &got, &full)?;
                } else if name.contains("thought.layers.0.mlp") {
                    let difference = scalar(&(&got - &full)?.sqr()?)?.sqrt();
                    assert!(difference > 1e-3 * scalar(&full.sqr()?)?.sqrt(), "{what}: not cut");
                }
            }
        }
    }
    Ok(())
}

/// Cut off from the last pass, layers before the span still learn through plain rows.
#[test]
fn what_came_before_learns_through_plain_rows_only() -> Result {
    let weights = weights(&config(false, None), 62)?;
    let learns = |batch: Batch| -> Result<Option<f64>> {
        let (vars, tensors) = variables(&weights)?;
        let model = model(&config(false, None), &tensors)?;
        let text = tiny::text(model.decoder(), &batch, 9)?;
        let thinking = Thinking::new(2).span(SPAN).gradient_passes(1);
        let mind = thinking.on(&model)?;
        let z = mind.encode(&text, Pass::Causal(&batch))?;
        let thoughts = mind.think(&text, z, |_, _| ())?;
        let h = mind.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
        let store = h.sqr()?.sum_all()?.backward()?;
        let name = "model.layers.0.mlp.down_proj.weight";
        store.get(&vars[name]).map(|it| scalar(&it.sqr()?)).transpose()
    };
    assert_eq!(learns(Batch::one(6)?)?, None, "all context");
    let plain = learns(tiny::prompt(6)?)?;
    assert!(plain.is_some_and(|square| square > 1e-6), "{plain:?}");
    Ok(())
}

#[test]
fn gradients_through_no_pass_are_refused() -> Result {
    let model = model(&config(false, None), &weights(&config(false, None), 1)?)?;
    let thinking = Thinking::new(2).gradient_passes(0);
    let error = thinking.on(&model).err().ok_or("accepted")?;
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
    assert!(Thinking::from_json(r#"{"passes": 2, "gradient_passes": 0}"#).is_err());
    Thinking::from_json(r#"{"passes": 2, "gradient_passes": 1}"#)?;
    Ok(())
}

/// A text that a cache takes up in several chunks, under a window that lets go of the first of
/// them: no gradient is lost on the way from one chunk to the next.
#[test]
fn chunks_of_one_pass_are_one_graph() -> Result {
    for window in [None, Some(40)] {
        let config = Config { num_hidden_layers: 2, ..config(true, window) };
        let (vars, tensors) = variables(&tiny::weights(&config, 71)?.into_iter().collect())?;
        let model = model(&config, &tensors)?;
        let text = tiny::text(model.decoder(), &Batch::ragged(&[1100, 30])?, 71)?;
        let of = |pass: Pass<'_>| -> Result<GradStore> {
            let model = model.decoder();
            let h = model.forward(text.embeddings(), model.all_layers(), pass)?;
            let last = h.narrow(0, 1070, 60)?; // in the last chunk, and tokens of both sequences
            Ok(model.logits(&last)?.sqr()?.mean_all()?.backward()?)
        };
        let (mut a, mut b) = (model.decoder().new_cache(1100)?, model.decoder().new_cache(30)?);
        let (batch, caches) = (text.batch(), vec![&mut a, &mut b]);
        let cached = of(Pass::Remembered { batch, sight: Sight::Causal, caches })?;
        let causal = of(Pass::Causal(text.batch()))?;
        for (name, var) in &vars {
            let (got, expected) = (gradient(&cached, name, var)?, gradient(&causal, name, var)?);
            assert_close(&format!("{name}, {window:?}"), &got, &expected, 1e-4)?;
        }
    }
    Ok(())
}

/// Half-precision variables get gradients, all of them, near those of the same numbers in `f32`.
#[test]
fn half_precision_weights_learn_too() -> Result {
    let run = run(Thinking::new(2).refine(Interpolate::gated()));
    let rounded = |dtype| -> Result<Weights> {
        let weights = weights(&run.config, 81)?.into_iter();
        weights.map(|(name, it)| Ok((name, it.to_dtype(DType::BF16)?.to_dtype(dtype)?))).collect()
    };
    let (vars, tensors) = variables(&rounded(DType::BF16)?)?;
    let (wide_vars, wide) = variables(&rounded(DType::F32)?)?;
    let ((_, got), (_, expected)) = (gradients(&run, &tensors)?, gradients(&run, &wide)?);
    for (name, var) in &vars {
        let got = gradient(&got, name, var)?.to_dtype(DType::F32)?;
        assert_close(name, &got, &gradient(&expected, name, &wide_vars[name])?, 2e-2)?;
    }
    Ok(())
}

/// An optimiser writes into the variables; the model that was built of them sees it.
#[test]
fn a_step_down_the_gradient_lowers_the_loss() -> Result {
    let run = run(Thinking::new(2).refine(Interpolate::gated()));
    let (vars, tensors) = variables(&weights(&run.config, 91)?)?;
    let model = model(&run.config, &tensors)?;
    let mut before = f64::INFINITY;
    for step in 0..5 {
        let loss = run.loss(&model)?;
        let value = scalar(&loss)?;
        assert!(value < before, "step {step}: {before} to {value}");
        before = value;
        let store = loss.backward()?;
        for (name, var) in &vars {
            var.set(&(var.as_tensor() - (gradient(&store, name, var)? * 0.05)?)?.detach())?;
        }
    }
    Ok(())
}
