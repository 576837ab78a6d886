//! Watches the thoughts move: says when to stop, and fills the trace.

use std::time::Instant;

use candle_core::Tensor;

use super::halting::Halting;
use super::readout::CausalReadout;
use super::recorder::Recorder;
use super::trace::{PassTrace, Trace};
use super::{ThoughtLoop, measure};
use crate::error::{Error, Result};
use crate::model::Batch;

/// The observers of one run of the loop.
pub(super) struct Watch<'a> {
    batch: &'a Batch,
    readout: &'a CausalReadout<'a>,
    halting: Halting<'a>,
    recorder: Recorder<'a>,
    trace: Trace,
    /// When the current pass began.
    started: Instant,
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        mind: &'a ThoughtLoop,
        batch: &'a Batch,
        readout: &'a CausalReadout<'a>,
        first: &'a Tensor,
    ) -> Result<Self> {
        let mut recorder = Recorder::new(mind, batch, readout, first);
        let mut trace =
            Trace { tokens: batch.lengths().into_iter().max().unwrap_or(0), ..Trace::default() };
        if !mind.thinking.is_none() {
            trace.first = recorder.tokens(first)?;
        }
        let halting = Halting::new(&mind.thinking.halt, batch);
        Ok(Self { batch, readout, halting, recorder, trace, started: Instant::now() })
    }

    /// Looks at what pass `index` made of `z`, and returns what the next one reads: sequences that have
    /// halted keep their thoughts.
    pub(super) fn observe(&mut self, index: usize, z: &Tensor, refined: Tensor) -> Result<Tensor> {
        let refined = self.halting.keep_halted(refined, z)?;
        let drift = measure::drift(z, &refined, self.batch)?;
        if drift.iter().flatten().any(|drift| !drift.is_finite()) {
            return Err(Error::NotFinite { what: "thoughts", position: index });
        }
        self.trace.passes.push(PassTrace {
            drift: self.halting.mean_of_active(&drift),
            seconds: self.started.elapsed().as_secs_f64(),
            tokens: self.recorder.tokens(&refined)?,
            maps: self.recorder.maps(z, &refined)?,
        });
        self.halting.update(&drift, z, &refined, self.readout)?;
        self.started = Instant::now();
        Ok(refined)
    }

    pub(super) fn all_halted(&self) -> bool {
        self.halting.all_halted()
    }

    pub(super) fn trace(self) -> Trace {
        match self.trace.passes.is_empty() {
            true => self.trace,
            false => Trace { halted: self.halting.reasons(), ..self.trace },
        }
    }
}
