//! Dictionaries on a model.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::Dictionary;
use super::adapter::{Columns, DictionaryAdapter};
use super::compile::reader;
use crate::adapter::AdapterScope;
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::kernels::FEW_ROWS;
use crate::model::{Linear, Seen, SideProjection, SideSignal, SideSource, Transformer};
use crate::thought::ThoughtModel;

impl HybridModel {
    /// A model of the same weights that looks the words of its texts up in a dictionary, where `scope` says: see
    /// [`dictionary`](crate::dictionary). No weights are copied. Adapters that are to be trained or used with it are
    /// added afterwards, because a dictionary knows the model that it was compiled by.
    ///
    /// Where it is for thinking alone, or for decoding alone, the hand-offs
    /// [`KeyValue`](crate::HandOff::KeyValue) and [`Mixed`](crate::HandOff::Mixed) run layer by layer, as with any
    /// adapter that is, and round differently.
    ///
    /// # Errors
    /// As [`ThoughtModel::with_dictionary`]; [`Error::Parameter`] for the dictionary of another model.
    pub fn with_dictionary(
        &self,
        dictionary: &Dictionary,
        adapter: &DictionaryAdapter,
        scope: AdapterScope,
    ) -> Result<Self> {
        dictionary.check_model(reader(self, dictionary.config()))?;
        self.with_thought_model(self.thought_model().with_dictionary(dictionary, adapter, scope)?)
    }
}

impl ThoughtModel {
    /// This model with a dictionary that is read where `scope` says. The weights are shared, not copied, and may be
    /// quantised. Unlike [`HybridModel::with_dictionary`], this does not look whether the dictionary is this model's,
    /// which a model in training need not be.
    ///
    /// # Errors
    /// [`Error::Parameter`] for vectors that were made in another way than the adapter was made for, of another width or
    /// for other layers, for another vocabulary, or for a second dictionary; [`Error::WeightShape`] for the adapter of
    /// another model; [`Error::Unsupported`] for a mixture of experts.
    pub fn with_dictionary(
        &self,
        dictionary: &Dictionary,
        adapter: &DictionaryAdapter,
        scope: AdapterScope,
    ) -> Result<Self> {
        self.changed(scope, |transformer| beside(transformer, dictionary, adapter))
    }
}

fn beside(
    transformer: &Transformer,
    dictionary: &Dictionary,
    adapter: &DictionaryAdapter,
) -> Result<Transformer> {
    let (model, device, dtype) = (transformer.config(), transformer.device(), transformer.dtype());
    dictionary.config().check(model)?;
    adapter.config().check_reads(dictionary.config())?;
    dictionary.check_sizes(model)?;
    let (hidden, inner) = (model.hidden_size, model.intermediate_size);
    let (mut read, mut projections) = (BTreeMap::new(), BTreeMap::new());
    for (layer, Columns { a, gate, up, generic }) in adapter.columns() {
        let rank = a.dim(0)?;
        for (half, tensor, expected) in
            [("A", a, [rank, hidden]), ("gate.B", gate, [inner, rank]), ("up.B", up, [inner, rank])]
        {
            if tensor.dims() != expected {
                let (name, place) =
                    (format!("{half} of layer {layer}"), "the dictionary's adapter".into());
                let (expected, got) = (expected.to_vec(), tensor.dims().to_vec());
                return Err(Error::WeightShape { name, place, expected, got });
            }
        }
        let here =
            |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.to_device(device)?.to_dtype(dtype)?) };
        let linear = |tensor: &Tensor| Linear::dense(&here(tensor)?);
        let place = dictionary.place_of(*layer)?;
        let generic = generic.as_ref().map(here).transpose()?;
        read.insert(*layer, Read { a: linear(a)?, generic, place });
        projections.insert(*layer, SideProjection { gate: linear(gate)?, up: linear(up)? });
    }
    let (dictionary, device) = (dictionary.clone(), device.clone());
    let beside = Beside { dictionary, read, hidden, device, dtype };
    transformer.with_side_source(Arc::new(beside), projections)
}

/// A dictionary, looked up in each pass.
#[derive(Debug)]
struct Beside {
    dictionary: Dictionary,
    /// By layer.
    read: BTreeMap<usize, Read>,
    hidden: usize,
    device: Device,
    dtype: DType,
}

/// What a layer reads of a vector.
#[derive(Debug)]
struct Read {
    a: Linear,
    generic: Option<Tensor>,
    /// Of the layer, among those of the dictionary.
    place: usize,
}

impl SideSource for Beside {
    fn signal(&self, texts: &[Seen<'_>], layers: Range<usize>) -> Result<SideSignal> {
        let rows: Vec<Option<u32>> =
            texts.iter().flat_map(|it| self.dictionary.entries(it)).collect();
        // Each entry once: row 0 of the table is what a row of no entry has.
        let (mut table, mut place_of) = (Vec::new(), HashMap::new());
        let places = rows.iter().map(|entry| match entry {
            None => 0,
            Some(entry) => *place_of.entry(*entry).or_insert_with(|| {
                table.push(*entry);
                table.len() as u32
            }),
        });
        let places: Vec<u32> = places.collect();
        let places = Tensor::new(places, &self.device)?; // (tokens)
        let mut signal = SideSignal::new();
        for (layer, read) in self.read.range(layers) {
            if table.is_empty() && read.generic.is_none() {
                continue; // nothing in any row
            }
            let vectors = self.vectors(&table, read)?; // (1 + entries, hidden), and more
            let narrow = read.a.forward(&vectors)?; // (…, rank)
            signal = signal.layer(*layer, narrow.index_select(&places, 0)?); // (tokens, rank)
        }
        Ok(signal)
    }
}

impl Beside {
    /// The vectors of rows of no entry, and of some entries. Few rows would round differently from many: so there are
    /// never as few, and a row does not show how many entries are looked up beside its own.
    fn vectors(&self, entries: &[u32], read: &Read) -> Result<Tensor> {
        let rows = entries.len().max(FEW_ROWS);
        let mut values = Vec::with_capacity(rows * self.hidden);
        for entry in entries {
            values.extend(self.dictionary.looked_up(*entry, read.place)?);
        }
        values.resize(rows * self.hidden, 0.0);
        let vectors =
            Tensor::from_vec(values, (rows, self.hidden), &self.device)?.to_dtype(self.dtype)?;
        let generic = match &read.generic {
            Some(generic) => generic.unsqueeze(0)?,
            None => Tensor::zeros((1, self.hidden), self.dtype, &self.device)?,
        };
        Ok(Tensor::cat(&[generic, vectors], 0)?)
    }
}
