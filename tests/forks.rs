//! Caches that fork: whatever was forked, truncated, rolled and failed before, a cache goes on as one that
//! was never anything but itself, and no pass that fails leaves a trace.

mod common;

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;

use candle_core::{DType, Tensor, Var};
use hybrid_attention::model::{
    Attended, Batch, ForwardContext, KvCache, KvPool, Pass, Sight, Site, Tap, Transformer,
};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::{Cancel, Config, Error, HandOff, Thinking};
use proptest::prelude::*;
use proptest::sample::Index;

use common::tiny;
use common::{Result, assert_close, assert_identical};

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// None, one that is smaller than a block, and one that is larger.
const WINDOWS: [Option<usize>; 3] = [None, Some(7), Some(130)];

fn config(sliding_window: Option<usize>, tied: bool) -> Config {
    Config { sliding_window, tie_word_embeddings: tied, ..tiny::config() }
}

fn bits(xs: &Tensor) -> Result<Vec<u32>> {
    Ok(xs.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// Takes up some tokens, all at once, and gives the logits after each: `(1, tokens, vocab)`.
fn take(model: &Transformer, cache: &mut KvCache, ids: &[u32]) -> Result<Tensor> {
    tiny::logits(model, &tiny::embed(model, ids)?, Pass::Cached(cache))
}

/// The bytes of one block.
fn block_bytes(config: &Config, dtype: DType) -> usize {
    let per_position = 2 * config.num_key_value_heads * config.head_dim;
    per_position * KvPool::BLOCK * dtype.size_in_bytes()
}

// ---- random trees ----

#[derive(Clone, Debug)]
enum Op {
    /// Takes up so many tokens.
    Take(usize),
    Fork,
    /// Forgets so many of the last tokens.
    Truncate(usize),
    /// The same in the layers from this one on.
    TruncateLayers(usize, usize),
    Reset,
    Drop,
}

fn ops() -> impl Strategy<Value = Vec<(Index, Op)>> {
    let op = prop_oneof![
        4 => (1usize..5).prop_map(Op::Take),
        4 => (1usize..130).prop_map(Op::Take),
        4 => Just(Op::Fork),
        3 => (0usize..150).prop_map(Op::Truncate),
        3 => (0usize..4, 0usize..150).prop_map(|(from, count)| Op::TruncateLayers(from, count)),
        1 => Just(Op::Reset),
        2 => Just(Op::Drop),
    ];
    prop::collection::vec((any::<Index>(), op), 1..16)
}

/// What a cache did, as another can do it again.
#[derive(Clone, Debug)]
enum Step {
    Take(Vec<u32>),
    Truncate(usize),
    TruncateLayers(usize, usize),
    Reset,
}

/// The tokens of a cache. Layers from `behind.0` on may have only the first `behind.1` of them.
#[derive(Clone, Debug, Default)]
struct Text {
    ids: Vec<u32>,
    behind: Option<(usize, usize)>,
}

/// The logits after the last of the tokens that a step takes up; none for another step.
fn apply(
    model: &Transformer,
    cache: &mut KvCache,
    text: &mut Text,
    step: &Step,
) -> Result<Option<Tensor>> {
    let layers = model.all_layers();
    match step {
        Step::Take(new) => {
            // Layers that are behind catch up with what the others remember.
            if let Some((from, length)) = text.behind.take() {
                let batch = Batch::one(text.ids.len())?;
                let xs = tiny::embed(model, &text.ids)?;
                let xs = model.forward(&xs, 0..from, Pass::Causal(&batch))?;
                let xs = xs.narrow(1, length, text.ids.len() - length)?;
                model.forward(&xs, from..layers.end, Pass::Cached(cache))?;
            }
            text.ids.extend(new);
            Ok(Some(take(model, cache, new)?.narrow(1, new.len() - 1, 1)?))
        }
        Step::Truncate(length) => {
            cache.truncate(*length)?;
            text.ids.truncate(*length);
            text.behind = text.behind.filter(|(_, behind)| behind < length);
            Ok(None)
        }
        Step::TruncateLayers(from, length) => {
            cache.truncate_layers(*from..layers.end, *length)?;
            match from {
                0 => text.ids.truncate(*length),
                from if *from < layers.end && *length < text.ids.len() => {
                    text.behind = Some((*from, *length));
                }
                _ => (),
            }
            Ok(None)
        }
        Step::Reset => {
            cache.reset();
            *text = Text::default();
            Ok(None)
        }
    }
}

/// Which blocks a layer of a cache holds, by the rules: shared by forks, whoever writes first copies, a
/// window lets go of whole blocks.
#[derive(Clone, Default)]
struct Blocks {
    held: VecDeque<Rc<()>>,
    first: usize,
    len: usize,
}

impl Blocks {
    fn take(&mut self, new: usize, window: Option<usize>) {
        if let Some(window) = window {
            while self.first + KvPool::BLOCK <= (self.len + 1).saturating_sub(window)
                && self.held.pop_front().is_some()
            {
                self.first += KvPool::BLOCK;
            }
        }
        if let Some(last) = self.held.get_mut((self.len - self.first) / KvPool::BLOCK)
            && Rc::strong_count(last) > 1
        {
            *last = Rc::new(());
        }
        self.len += new;
        while self.first + self.held.len() * KvPool::BLOCK < self.len {
            self.held.push_back(Rc::new(()));
        }
    }

    fn truncate(&mut self, length: usize) {
        if length < self.len {
            self.len = length;
            self.held.truncate(
                length.div_ceil(KvPool::BLOCK).saturating_sub(self.first / KvPool::BLOCK),
            );
            if self.held.is_empty() {
                self.first = length / KvPool::BLOCK * KvPool::BLOCK;
            }
        }
    }
}

/// One cache of a tree.
struct Line {
    cache: KvCache,
    text: Text,
    /// How it came to what it is.
    steps: Vec<Step>,
    /// What it should hold, layer by layer.
    blocks: Vec<Blocks>,
    /// What it says after one more token.
    says: Vec<u32>,
}

struct Tree<'a> {
    model: &'a Transformer,
    pool: KvPool,
    lines: Vec<Line>,
    /// Counts what was asked.
    asked: usize,
}

impl Tree<'_> {
    const CAPACITY: usize = 260;
    const MOST: usize = 5;

    fn window(&self) -> Option<usize> {
        self.model.config().sliding_window
    }

    /// The token that each line is asked with: one more than it holds.
    fn probe(&self, text: &Text) -> u32 {
        (text.ids.len() % self.model.config().vocab_size) as u32
    }

    /// What should be held when a step has been done.
    fn count(&self, blocks: &mut [Blocks], text: &Text, step: &Step) {
        match step {
            Step::Take(new) => {
                for layer in blocks {
                    let catches_up = text.ids.len() - layer.len;
                    if catches_up > 0 {
                        layer.take(catches_up, self.window());
                    }
                    layer.take(new.len(), self.window());
                }
            }
            Step::Truncate(length) => blocks.iter_mut().for_each(|layer| layer.truncate(*length)),
            Step::TruncateLayers(from, length) => {
                blocks.iter_mut().skip(*from).for_each(|layer| layer.truncate(*length));
            }
            Step::Reset => blocks.fill_with(Blocks::default),
        }
    }

    /// Does a step in one line, which must be refused where it has to be, and then change nothing.
    fn step(&mut self, index: usize, step: Step) -> Result {
        let before = state(&self.lines[index].cache);
        let window = self.window();
        let (model, line) = (self.model, &mut self.lines[index]);
        let mut text = line.text.clone();
        // The next token would see positions needed..length.
        let rolls = |length: usize, layers: &[Blocks]| {
            let needed = window.map_or(0, |window| (length + 1).saturating_sub(window));
            layers.iter().any(|it| length < it.len && needed < length && needed < it.first)
        };
        let refused = match &step {
            Step::Take(new) => line.text.ids.len() + new.len() > Self::CAPACITY,
            Step::Truncate(length) => rolls(*length, &line.blocks),
            Step::TruncateLayers(from, length) => rolls(*length, &line.blocks[*from..]),
            Step::Reset => false,
        };
        if refused && line.text.behind.is_some() && matches!(step, Step::Take(_)) {
            return Ok(()); // what is behind would catch up
        }
        match apply(model, &mut line.cache, &mut text, &step) {
            Ok(_) if !refused => (),
            Err(error) if refused => {
                let error = error.downcast::<Error>()?;
                let expected = match step {
                    Step::Take(_) => matches!(*error, Error::ContextFull { .. }),
                    _ => matches!(*error, Error::CacheRolled { .. }),
                };
                assert!(expected, "{step:?}: {error}");
                assert_eq!(state(&self.lines[index].cache), before, "{step:?}");
                return Ok(());
            }
            result => return Err(format!("{step:?}: {result:?}, refused: {refused}").into()),
        }
        let mut blocks = std::mem::take(&mut line.blocks);
        self.count(&mut blocks, &self.lines[index].text, &step);
        let line = &mut self.lines[index];
        (line.blocks, line.text) = (blocks, text);
        line.steps.push(step);
        self.pass_behind(index)
    }

    /// Layers of different length cannot run together.
    fn pass_behind(&mut self, index: usize) -> Result {
        let line = &mut self.lines[index];
        if line.text.behind.is_some() {
            let before = state(&line.cache);
            let error = take(self.model, &mut line.cache, &[0]).err().ok_or("it ran")?;
            let error = error.downcast::<Error>()?;
            assert!(matches!(*error, Error::Parameter { name: "cache", .. }), "{error}");
            assert_eq!(state(&line.cache), before);
        }
        Ok(())
    }

    fn fork(&mut self, index: usize) {
        let Line { cache, text, steps, blocks, says } = &self.lines[index];
        let (text, steps, blocks, says) =
            (text.clone(), steps.clone(), blocks.clone(), says.clone());
        let line = Line { cache: cache.fork(), text, steps, blocks, says };
        self.lines.push(line);
    }

    /// What a line says next: asked by a fork, or itself and made to forget it.
    fn ask(&mut self, index: usize) -> Result<Tensor> {
        self.asked += 1;
        let (model, window) = (self.model, self.window());
        let by_fork = self.asked.is_multiple_of(2) || self.lines[index].text.behind.is_some();
        let probe = self.probe(&self.lines[index].text);
        let line = &mut self.lines[index];
        let ids = [probe];
        if by_fork {
            let mut text = line.text.clone();
            let step = Step::Take(ids.to_vec());
            let said = apply(model, &mut line.cache.fork(), &mut text, &step)?;
            return said.ok_or_else(|| "nothing was said".into());
        }
        let said = take(model, &mut line.cache, &ids)?;
        line.cache.truncate(line.text.ids.len())?;
        for layer in &mut line.blocks {
            layer.take(1, window);
            layer.truncate(line.text.ids.len());
        }
        Ok(said)
    }

    /// Every line says what it has to, and the pool holds what all of them need together.
    fn check(&mut self, touched: Option<usize>) -> Result {
        for index in 0..self.lines.len() {
            let said = self.ask(index)?;
            if touched == Some(index) {
                let line = &self.lines[index];
                let name = format!("{:?}", line.steps);
                // One that never was a fork, and did the same.
                let mut alone = self
                    .model
                    .new_pool(self.pool.dtype(), usize::MAX)?
                    .new_cache(Self::CAPACITY + 1)?;
                let mut text = Text::default();
                for step in &line.steps {
                    apply(self.model, &mut alone, &mut text, step)?;
                }
                assert_eq!(text.ids, line.text.ids);
                let step = Step::Take(vec![self.probe(&text)]);
                let expected = apply(self.model, &mut alone, &mut text, &step)?.ok_or("nothing")?;
                assert_identical(&name, &said, &expected)?;
                // All of it anew, without a cache.
                if self.pool.dtype() == DType::F32 {
                    let batch = Batch::one(text.ids.len())?;
                    let xs = tiny::embed(self.model, &text.ids)?;
                    let anew = tiny::logits(self.model, &xs, Pass::Causal(&batch))?;
                    let anew = anew.narrow(1, text.ids.len() - 1, 1)?;
                    assert_close(&name, &said, &anew, 1e-4)?;
                }
                self.lines[index].says = bits(&said)?;
            }
            assert_eq!(bits(&said)?, self.lines[index].says, "line {index} was left alone");
            let Line { cache, text, blocks, .. } = &self.lines[index];
            let held: usize = blocks.iter().map(|layer| layer.held.len()).sum();
            assert_eq!(cache.bytes(), held * block_bytes(self.model.config(), self.pool.dtype()));
            let lens = blocks.iter().map(|layer| layer.len).min();
            let oldest = blocks.iter().map(|layer| layer.first).max();
            assert_eq!((Some(cache.len()), Some(cache.oldest())), (lens, oldest));
            assert_eq!(cache.is_empty(), matches!(cache.len(), 0));
            assert!(cache.len() <= text.ids.len());
        }
        let all = self.lines.iter().flat_map(|line| &line.blocks).flat_map(|layer| &layer.held);
        let distinct: HashSet<_> = all.map(Rc::as_ptr).collect();
        let expected = distinct.len() * block_bytes(self.model.config(), self.pool.dtype());
        assert_eq!(self.pool.used_bytes(), expected, "{} lines", self.lines.len());
        Ok(())
    }

    fn run(&mut self, index: &Index, op: &Op, seed: u64) -> Result<Option<usize>> {
        let index = index.index(self.lines.len());
        let held = self.lines[index].text.ids.len();
        match *op {
            Op::Take(count) => {
                // A full cache could not be asked what it says next.
                let count = count + usize::from(held + count == Self::CAPACITY);
                self.step(index, Step::Take(tiny::tokens(self.model.config(), seed, count)))?;
            }
            Op::Fork if self.lines.len() < Self::MOST => {
                self.fork(index);
                return Ok(Some(self.lines.len() - 1));
            }
            Op::Drop if self.lines.len() > 1 => {
                self.lines.remove(index);
                return Ok(None);
            }
            Op::Fork | Op::Drop => (),
            Op::Truncate(count) => self.step(index, Step::Truncate(held.saturating_sub(count)))?,
            Op::TruncateLayers(from, count) if self.lines[index].text.behind.is_none() => {
                let from = from.min(self.model.all_layers().end);
                self.step(index, Step::TruncateLayers(from, held.saturating_sub(count)))?;
            }
            Op::TruncateLayers(..) => (),
            Op::Reset => self.step(index, Step::Reset)?,
        }
        Ok(Some(index))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// After every operation each cache says what full recomputation says, to the last bit what a cache
    /// says that never forked, and the pool holds each block once.
    #[test]
    fn every_line_of_a_tree_is_recomputation(
        ops in ops(), seed in 0u64..1000, tied: bool,
        dtype in prop::sample::select(&DTYPES), window in prop::sample::select(&WINDOWS),
    ) {
        let run = || -> Result {
            let model = tiny::transformer(&config(window, tied), seed)?;
            let pool = model.new_pool(dtype, usize::MAX)?;
            let blocks = vec![Blocks::default(); model.all_layers().end];
            let cache = pool.new_cache(Tree::CAPACITY)?;
            let line = Line { cache, text: Text::default(), steps: vec![], blocks, says: vec![] };
            let mut tree = Tree { model: &model, pool, lines: vec![line], asked: 0 };
            tree.check(Some(0))?;
            for (number, (index, op)) in ops.iter().enumerate() {
                let touched = tree.run(index, op, seed + number as u64)?;
                tree.check(touched)?;
            }
            tree.lines.clear();
            assert_eq!(tree.pool.used_bytes(), 0);
            Ok(())
        };
        tiny::holds(run())?;
    }

    /// Forks of a prefix cost what they write: its last block, if it is not full, once for each that
    /// writes into it but the last one to hold it, and the blocks behind.
    #[test]
    fn forks_share_the_blocks_of_their_prefix(
        prefix in 1usize..300, new in prop::collection::vec(0usize..200, 1..5),
        dtype in prop::sample::select(&DTYPES), drop_prefix: bool,
    ) {
        let run = || -> Result {
            let model = tiny::transformer(&config(None, false), 1)?;
            let pool = model.new_pool(dtype, usize::MAX)?;
            let per_block = model.all_layers().end * block_bytes(model.config(), dtype);
            let mut root = pool.new_cache(600)?;
            take(&model, &mut root, &tiny::tokens(model.config(), 1, prefix))?;
            let whole = prefix.div_ceil(KvPool::BLOCK);
            assert_eq!(pool.used_bytes(), whole * per_block);
            let mut forks: Vec<KvCache> = new.iter().map(|_| root.fork()).collect();
            assert_eq!(pool.used_bytes(), whole * per_block);
            let root = (!drop_prefix).then_some(root);

            let (mut used, mut holders) = (whole, forks.len() + usize::from(root.is_some()));
            for (index, (fork, new)) in forks.iter_mut().zip(&new).enumerate() {
                let ids = tiny::tokens(model.config(), index as u64, *new);
                if *new == 0 {
                    continue;
                }
                take(&model, fork, &ids)?;
                used += (prefix + new).div_ceil(KvPool::BLOCK) - whole;
                if prefix % KvPool::BLOCK > 0 && holders > 1 {
                    used += 1;
                    holders -= 1;
                }
                assert_eq!(pool.used_bytes(), used * per_block, "fork {index}");
                let bytes = (prefix + new).div_ceil(KvPool::BLOCK) * per_block;
                assert_eq!(fork.bytes(), bytes);
            }
            drop(forks);
            assert_eq!(pool.used_bytes(), root.as_ref().map_or(0, KvCache::bytes));
            drop(root);
            assert_eq!(pool.used_bytes(), 0);
            Ok(())
        };
        tiny::holds(run())?;
    }
}

/// Each of several threads goes on from its own fork, all at once, as one after the other.
#[test]
fn forks_go_on_in_threads_at_once() -> Result {
    for (window, dtype) in WINDOWS.iter().flat_map(|window| DTYPES.map(|dtype| (*window, dtype))) {
        let model = tiny::transformer(&config(window, false), 3)?;
        let go_on = |cache: &mut KvCache, thread: u64| -> std::result::Result<Vec<u32>, String> {
            let run = |cache: &mut KvCache| -> Result<Vec<u32>> {
                let mut said = Vec::new();
                for (turn, count) in [1, 1, 70, 1, 30].into_iter().enumerate() {
                    let ids = tiny::tokens(model.config(), 10 * thread + turn as u64, count);
                    said.extend(bits(&take(&model, cache, &ids)?)?);
                    if turn == 2 {
                        cache.truncate(cache.len() - 40)?;
                    }
                }
                Ok(said)
            };
            run(cache).map_err(|error| error.to_string())
        };
        for prefix in [90, 96, 130] {
            let pool = model.new_pool(dtype, usize::MAX)?;
            let mut root = pool.new_cache(300)?;
            take(&model, &mut root, &tiny::tokens(model.config(), 3, prefix))?;
            let mut expected = Vec::new();
            for thread in 0..3 {
                expected.push(go_on(&mut root.fork(), thread)?);
            }
            for _ in 0..4 {
                let mut forks: Vec<_> = (0..3).map(|_| root.fork()).collect();
                let got = std::thread::scope(|scope| {
                    let threads: Vec<_> = (0..)
                        .zip(&mut forks)
                        .map(|(thread, fork)| {
                            let go_on = &go_on;
                            scope.spawn(move || go_on(fork, thread))
                        })
                        .collect();
                    threads
                        .into_iter()
                        .map(|it| it.join().map_err(|_| "a thread"))
                        .collect::<Vec<_>>()
                });
                for (got, expected) in got.into_iter().zip(&expected) {
                    assert_eq!(&got??, expected, "{window:?} {dtype:?} {prefix}");
                }
            }
            assert_eq!(pool.used_bytes(), root.bytes());
        }
    }
    Ok(())
}

// ---- a full pool ----

/// What can be seen of a cache without running it.
fn state(cache: &KvCache) -> (usize, usize, usize) {
    (cache.len(), cache.oldest(), cache.bytes())
}

/// All of several caches, and what their pool holds.
fn states(caches: &[KvCache]) -> (Vec<(usize, usize, usize)>, usize) {
    let used = caches.first().map_or(0, |cache| cache.pool().used_bytes());
    (caches.iter().map(state).collect(), used)
}

/// What is injected where a pass can be looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Error,
    Cancel,
    Unwinding,
}

/// Looks on, and does something about it the n-th time.
struct Injected {
    fault: Fault,
    at: usize,
    seen: usize,
    cancel: Cancel,
}

impl Injected {
    fn new(fault: Fault, at: usize) -> Self {
        Self { fault, at, seen: 0, cancel: Cancel::default() }
    }

    /// Nothing.
    fn never() -> Self {
        Self::new(Fault::Error, usize::MAX)
    }

    fn look(&mut self) -> hybrid_attention::Result<()> {
        self.seen += 1;
        if self.seen - 1 == self.at {
            match self.fault {
                Fault::Error => return Err(Error::StreamFailed),
                Fault::Cancel => self.cancel.cancel(),
                Fault::Unwinding => panic::resume_unwind(Box::new("injected")),
            }
        }
        Ok(())
    }
}

impl Tap for Injected {
    fn residual(&mut self, _: usize, _: Site, _: &Tensor) -> hybrid_attention::Result<()> {
        self.look()
    }

    fn attention(&mut self, _: usize, _: &Attended<'_>) -> hybrid_attention::Result<()> {
        self.look()
    }
}

/// A pass over caches, one sequence for each.
#[derive(Clone, Debug)]
struct Scene {
    window: Option<usize>,
    dtype: DType,
    /// What each cache holds, and how much each takes up.
    pasts: Vec<usize>,
    new: Vec<usize>,
    sight: Sight,
    /// Whether others hold the caches' blocks, too.
    shared: bool,
}

impl Scene {
    fn model(&self) -> Result<Transformer> {
        tiny::transformer(&config(self.window, false), 5)
    }

    /// The caches, and others that share their blocks.
    fn caches(&self, model: &Transformer, pool: &KvPool) -> Result<(Vec<KvCache>, Vec<KvCache>)> {
        let mut caches = Vec::new();
        for (index, past) in self.pasts.iter().enumerate() {
            let mut cache = pool.new_cache(2000)?;
            if *past > 0 {
                take(model, &mut cache, &tiny::tokens(model.config(), index as u64, *past))?;
            }
            caches.push(cache);
        }
        let others = caches.iter().filter(|_| self.shared).map(KvCache::fork).collect();
        Ok((caches, others))
    }

    fn new_tokens(&self, model: &Transformer) -> Result<Tensor> {
        let count = self.new.iter().sum();
        Ok(model.embed_ids(&tiny::tokens(model.config(), 77, count))?)
    }

    fn forward(
        &self,
        model: &Transformer,
        caches: &mut [KvCache],
        xs: &Tensor,
        tap: &mut Injected,
    ) -> hybrid_attention::Result<Tensor> {
        let batch = Batch::ragged(&self.new)?;
        let cancel = tap.cancel.clone();
        let pass = match caches {
            [only] if self.sight == Sight::Causal => Pass::Cached(only),
            several => {
                let caches = several.iter_mut().collect();
                Pass::Remembered { batch: &batch, sight: self.sight, caches }
            }
        };
        let context = ForwardContext::from(pass).tap(tap).cancel(&cancel);
        model.forward(xs, model.all_layers(), context)
    }

    /// What forks of the caches say after one more token each.
    fn say(&self, model: &Transformer, caches: &[KvCache]) -> Result<Vec<u32>> {
        let said = caches.iter().map(|cache| bits(&take(model, &mut cache.fork(), &[3])?));
        Ok(said.collect::<Result<Vec<_>>>()?.concat())
    }
}

/// Nothing was computed and nothing moved; when there is memory again, the pass gives what it gives
/// where there always was. A pass needs memory for all of its tokens before the first of them runs.
#[test]
fn a_full_pool_changes_nothing() -> Result {
    let single = |past: usize, new: usize| (vec![past], vec![new]);
    let cases = [
        single(0, 1),
        single(0, 200),
        single(0, 1100), // the first chunk would fit
        single(50, 60),
        single(96, 1),
        single(150, 700),
        (vec![50, 10], vec![60, 100]), // the first would fit
        (vec![0, 100], vec![100, 10]),
        (vec![90, 90, 90], vec![7, 600, 7]),
    ];
    for (pasts, new) in cases {
        for (dtype, shared) in DTYPES.into_iter().zip([false, true, true]) {
            let scene = Scene {
                window: None,
                dtype,
                pasts: pasts.clone(),
                new: new.clone(),
                sight: Sight::Causal,
                shared,
            };
            let model = scene.model()?;
            let xs = scene.new_tokens(&model)?;

            let ample = model.new_pool(dtype, usize::MAX)?;
            let (mut caches, _others) = scene.caches(&model, &ample)?;
            let before = ample.used_bytes();
            let expected = scene.forward(&model, &mut caches, &xs, &mut Injected::never())?;
            let (needed, said) = (ample.used_bytes(), scene.say(&model, &caches)?);
            let block = block_bytes(model.config(), dtype);

            // A block less than what is needed, one block more than there is, and nothing more.
            for budget in [needed - 1, before + block, before] {
                let name = format!("{scene:?}, {budget} of {needed} bytes");
                let pool = model.new_pool(dtype, budget)?;
                let (mut caches, _others) = scene.caches(&model, &pool)?;
                let was = states(&caches);
                let mut tap = Injected::never();
                let refused = scene.forward(&model, &mut caches, &xs, &mut tap);
                let Err(Error::PoolFull { budget: of, used, requested }) = refused else {
                    return Err(format!("{name}: {refused:?}").into());
                };
                assert!(of == budget && used + requested > budget, "{name}");
                assert_eq!(used, was.1, "{name}");
                assert_eq!(tap.seen, 0, "{name}: something was computed");
                assert_eq!(states(&caches), was, "{name}");
            }

            // Exactly enough, once somebody else has let go of a block.
            let pool = model.new_pool(dtype, needed)?;
            let mut other = pool.new_cache(1)?;
            take(&model, &mut other, &[1])?;
            let (mut caches, _others) = scene.caches(&model, &pool)?;
            let was = states(&caches);
            let refused = scene.forward(&model, &mut caches, &xs, &mut Injected::never());
            assert!(matches!(refused, Err(Error::PoolFull { .. })), "{scene:?}: {refused:?}");
            assert_eq!(states(&caches), was);
            other.reset();
            let got = scene.forward(&model, &mut caches, &xs, &mut Injected::never())?;
            assert_identical("after all", &got, &expected)?;
            assert_eq!(pool.used_bytes(), needed);
            let mut wide = model.new_pool(dtype, usize::MAX)?.new_cache(8)?;
            take(&model, &mut wide, &[2])?; // another pool's budget is another's
            drop((caches, _others));
            assert_eq!(pool.used_bytes(), 0);

            // They say next what they would have said.
            let pool = model.new_pool(dtype, 2 * needed)?;
            let (mut caches, _others) = scene.caches(&model, &pool)?;
            let mut hoard = pool.new_cache(2000)?;
            while take(&model, &mut hoard, &tiny::tokens(model.config(), 4, 90)).is_ok() {}
            let refused = scene.forward(&model, &mut caches, &xs, &mut Injected::never());
            drop(hoard);
            if refused.is_err() {
                let got = scene.forward(&model, &mut caches, &xs, &mut Injected::never())?;
                assert_identical("after the refusal", &got, &expected)?;
            }
            assert_eq!(scene.say(&model, &caches)?, said);
        }
    }
    Ok(())
}

/// Under a window a long text needs no more memory than a chunk and what its first token sees, and the
/// memory for all of its chunks is there before the first of them runs.
#[test]
fn a_window_runs_through_a_small_pool() -> Result {
    for (window, dtype) in [(7, DType::F32), (130, DType::BF16)] {
        let model = tiny::transformer(&config(Some(window), false), 5)?;
        let block = model.all_layers().end * block_bytes(model.config(), dtype);
        let ids = tiny::tokens(model.config(), 6, 1500);
        let mut wide = model.new_pool(dtype, usize::MAX)?.new_cache(2000)?;
        let expected = take(&model, &mut wide, &ids)?;
        // Of a chunk's first token the window - 1 before it, which may begin inside a block.
        let most = (window - 1 + 512).div_ceil(KvPool::BLOCK) + 1;
        let pool = model.new_pool(dtype, most * block)?;
        let mut cache = pool.new_cache(2000)?;
        assert_identical("small pool", &take(&model, &mut cache, &ids)?, &expected)?;
        assert!(pool.used_bytes() <= most * block);

        // What a pass lets go of is held until it has ended, so that it can be undone: five blocks here.
        let tight = model.new_pool(dtype, 7 * block)?;
        let mut cache = tight.new_cache(2000)?;
        take(&model, &mut cache, &ids[..400])?; // fits
        let was = (state(&cache), tight.used_bytes());
        let mut tap = Injected::never();
        let xs = tiny::embed(&model, &ids[400..])?;
        let context = ForwardContext::from(Pass::Cached(&mut cache)).tap(&mut tap);
        let refused = model.forward(&xs, model.all_layers(), context);
        assert!(matches!(refused, Err(Error::PoolFull { .. })), "{refused:?}");
        assert_eq!(tap.seen, 0);
        assert_eq!((state(&cache), tight.used_bytes()), was);
        // In pieces that fit it goes on as anybody.
        let mut other = model.new_pool(dtype, usize::MAX)?.new_cache(2000)?;
        take(&model, &mut other, &ids[..400])?;
        for piece in ids[400..].chunks(100) {
            let got = take(&model, &mut cache, piece)?;
            assert_identical("a piece", &got, &take(&model, &mut other, piece)?)?;
        }
    }
    Ok(())
}

// ---- a pass that fails ----

/// Where faults are injected: everywhere, or at every so-many-th place.
fn faults(scene: &Scene, tracked: bool, kinds: &[Fault], every: usize) -> Result {
    let model = scene.model()?;
    let xs = scene.new_tokens(&model)?;
    let var = Var::from_tensor(&xs)?;
    let runs = if tracked { var.as_tensor().clone() } else { xs.clone() };

    // What is expected: everything as if no pass had ever failed.
    let pool = model.new_pool(scene.dtype, usize::MAX)?;
    let (mut caches, others) = scene.caches(&model, &pool)?;
    let says = [scene.say(&model, &caches)?, scene.say(&model, &others)?];
    let mut tap = Injected::never();
    let expected = scene.forward(&model, &mut caches, &runs, &mut tap)?;
    let gradient = |ys: &Tensor| -> Result<Option<Tensor>> {
        if !tracked {
            return Ok(None);
        }
        let loss = (ys * tiny::noise(7, ys.dims(), 0.3)?)?.sum_all()?;
        Ok(Some(loss.backward()?.get(&var).ok_or("no gradient")?.clone()))
    };
    let (gradient_expected, after) = (gradient(&expected)?, scene.say(&model, &caches)?);
    let (places, used_after) = (tap.seen, pool.used_bytes());

    let pool = model.new_pool(scene.dtype, usize::MAX)?;
    let (mut caches, mut others) = scene.caches(&model, &pool)?;
    let was = (states(&caches), states(&others));
    for (&fault, at) in
        kinds.iter().flat_map(|kind| (0..places).step_by(every).map(move |at| (kind, at)))
    {
        let name = format!("{scene:?}, tracked {tracked}, {fault:?} at {at} of {places}");
        let mut tap = Injected::new(fault, at);
        let failed = panic::catch_unwind(AssertUnwindSafe(|| {
            scene.forward(&model, &mut caches, &runs, &mut tap)
        }));
        match (fault, failed) {
            (Fault::Error, Ok(Err(Error::StreamFailed))) => {
                assert_eq!(tap.seen, at + 1, "{name}: it went on");
            }
            // After the last place there is no layer before which it could have stopped.
            (Fault::Cancel, Ok(Err(Error::Cancelled))) => {
                // At the latest before the next layer, of which there are four looks.
                assert_eq!(tap.seen, (at / 4 + 1) * 4, "{name}");
            }
            (Fault::Cancel, Ok(Ok(_))) if at / 4 == (places - 1) / 4 => {
                (caches, others) = scene.caches(&model, &pool)?;
                continue;
            }
            (Fault::Unwinding, Err(_)) => (),
            (_, other) => return Err(format!("{name}: {other:?}").into()),
        }
        assert_eq!((states(&caches), states(&others)), was, "{name}");
        assert_eq!([scene.say(&model, &caches)?, scene.say(&model, &others)?], says, "{name}");
    }
    let got = scene.forward(&model, &mut caches, &runs, &mut Injected::never())?;
    let name = format!("{scene:?}, tracked {tracked}");
    assert_identical(&name, &got.detach(), &expected.detach())?;
    if let (Some(got), Some(expected)) = (gradient(&got)?, &gradient_expected) {
        assert_identical(&name, &got, expected)?;
    }
    assert_eq!(scene.say(&model, &caches)?, after, "{name}");
    assert_eq!(pool.used_bytes(), used_after, "{name}");
    assert_eq!(scene.say(&model, &others)?, says[1], "{name}");
    Ok(())
}

const KINDS: [Fault; 3] = [Fault::Error, Fault::Cancel, Fault::Unwinding];

/// At every place of every layer of every chunk of a long text.
#[test]
fn a_failing_pass_over_one_sequence_was_never_begun() -> Result {
    for (window, dtype, past) in [
        (None, DType::F32, 0),
        (None, DType::BF16, 150),
        (Some(7), DType::F32, 150),
        (Some(7), DType::F16, 0),
        (Some(130), DType::F32, 500),
        (Some(130), DType::BF16, 96),
    ] {
        let (pasts, new, sight) = (vec![past], vec![1100], Sight::Causal);
        let scene = Scene { window, dtype, pasts, new, sight, shared: past > 0 };
        faults(&scene, false, &KINDS, 1)?;
        faults(&scene, true, &KINDS, 5)?;
    }
    Ok(())
}

/// Also where a sequence ends in one chunk and the next begins, and where sequences see both ways.
#[test]
fn a_failing_pass_over_several_sequences_was_never_begun() -> Result {
    for (window, dtype) in [(None, DType::F32), (Some(7), DType::BF16), (Some(130), DType::F32)] {
        for (pasts, new) in [
            (vec![0, 120, 40], vec![1, 1, 1]),
            (vec![0, 120, 40], vec![300, 1, 330]),
            (vec![200, 0], vec![600, 100]),
        ] {
            for sight in [Sight::Causal, Sight::Bidirectional] {
                let (pasts, new) = (pasts.clone(), new.clone());
                let scene = Scene { window, dtype, pasts, new, sight, shared: true };
                faults(&scene, false, &KINDS, 1)?;
                faults(&scene, true, &KINDS, 7)?;
            }
        }
    }
    Ok(())
}

/// Only some layers run, and those are as they were.
#[test]
fn a_failing_pass_over_some_layers_was_never_begun() -> Result {
    for window in WINDOWS {
        let model = tiny::transformer(&config(window, true), 9)?;
        let ids = tiny::tokens(model.config(), 9, 900);
        let xs = tiny::embed(&model, &ids)?;
        let lower = model.forward(&xs, 0..1, Pass::Causal(&Batch::one(900)?))?;
        let fill = |cache: &mut KvCache| -> Result {
            model.forward(&xs.narrow(1, 0, 200)?, 0..3, Pass::Cached(cache))?;
            model.forward(&xs.narrow(1, 200, 700)?, 0..1, Pass::Cached(cache))?;
            Ok(())
        };
        let run = |cache: &mut KvCache, layers: Range<usize>, tap: &mut Injected| {
            let rows = lower.narrow(1, 200, 700)?;
            model.forward(&rows, layers, ForwardContext::from(Pass::Cached(cache)).tap(tap))
        };
        let mut never = model.new_cache(1000)?;
        fill(&mut never)?;
        let mut cache = model.new_cache(1000)?;
        fill(&mut cache)?;
        let was = (state(&cache), cache.pool().used_bytes());
        for at in 0..16 {
            let failed = run(&mut cache, 1..3, &mut Injected::new(Fault::Error, at));
            assert!(matches!(failed, Err(Error::StreamFailed)), "{failed:?}");
            assert_eq!((state(&cache), cache.pool().used_bytes()), was, "{window:?} {at}");
        }
        let got = run(&mut cache, 1..3, &mut Injected::never())?;
        assert_identical("layers", &got, &run(&mut never, 1..3, &mut Injected::never())?)?;
        assert_eq!(state(&cache), state(&never));
        let next = take(&model, &mut cache, &[5])?;
        assert_identical("next", &next, &take(&model, &mut never, &[5])?)?;
    }
    Ok(())
}

/// Layers that a cancelled hand-off was about to fill are as they were, and can be filled.
#[test]
fn a_cancelled_hand_off_can_be_done_again() -> Result {
    for (window, hand_off) in WINDOWS.iter().flat_map(|window| {
        let ways = [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }];
        ways.map(|way| (*window, way))
    }) {
        let model = tiny::thought_model(&config(window, false), 8)?;
        let decoder = model.decoder();
        let text = tiny::text(decoder, &tiny::prompt(150)?, 8)?;
        let thinking = Thinking::new(2).span(1..3).refine(Interpolate::new(0.4));
        let mind = thinking.hand_off(hand_off).on(&model)?;
        let mut cache = decoder.new_cache(200)?;
        let z = mind.encode(&text, Pass::Cached(&mut cache))?;
        let thoughts = mind.think(&text, z, |_, _| ())?;
        let mut never = cache.fork();
        let expected = mind.hand_off(&text, &thoughts, Pass::Cached(&mut never))?;

        let cancel = Cancel::default();
        let cancelled = mind.clone().cancel(cancel.clone());
        cancel.cancel();
        let was = (state(&cache), cache.pool().used_bytes());
        let failed = cancelled.hand_off(&text, &thoughts, Pass::Cached(&mut cache));
        assert!(matches!(failed, Err(Error::Cancelled)), "{failed:?}");
        assert_eq!((state(&cache), cache.pool().used_bytes()), was);
        let failed = cancelled.encode(&text, Pass::Cached(&mut decoder.new_cache(200)?));
        assert!(matches!(failed, Err(Error::Cancelled)), "{failed:?}");
        let failed = cancelled.think(&text, thoughts.first.clone(), |_, _| ());
        assert!(matches!(failed, Err(Error::Cancelled)), "{failed:?}");

        let got = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?;
        assert_identical("hand-off", &got, &expected)?;
        let next = take(decoder, &mut cache, &[5])?;
        assert_identical("next", &next, &take(decoder, &mut never, &[5])?)?;
    }
    Ok(())
}
