//! What is trained: the columns that read a dictionary.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::DictionaryConfig;
use crate::adapter::{Values, serialize};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::load::TensorFile;
use crate::replace::replace;

const ABOUT: &str = "dictionary_adapter";

/// How MLPs read a dictionary: with `d` the vector of a row, `gate(x)` and `up(x)` of each of its layers become
/// `W x + B A d`. `A`, `(rank, hidden)`, is shared by the two; each has a `B`, `(intermediate, rank)`.
///
/// It belongs to a model and a way of making vectors, and not to the entries of a dictionary: one that was trained with
/// some entries reads any others. Its tensors are `f32`.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::dictionary::{DictionaryAdapter, DictionaryConfig};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let config = DictionaryConfig::layers([1, 2]);
/// let adapter = DictionaryAdapter::new(model.config(), &config, 8, 42, &Device::Cpu)?;
/// assert_eq!(adapter.trainable()?.variables()?.len(), 6); // A and two Bs of each layer
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DictionaryAdapter {
    config: DictionaryConfig,
    /// By layer.
    columns: BTreeMap<usize, Columns>,
}

/// Of one layer.
#[derive(Clone, Debug)]
pub(super) struct Columns {
    /// `(rank, hidden)`
    pub(super) a: Tensor,
    /// `(intermediate, rank)`
    pub(super) gate: Tensor,
    /// `(intermediate, rank)`
    pub(super) up: Tensor,
    /// `(hidden)`
    pub(super) generic: Option<Tensor>,
}

impl Columns {
    /// Under the names that they have in a file.
    fn tensors_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        let Self { a, gate, up, generic } = self;
        let all = [("A", a), ("gate.B", gate), ("up.B", up)];
        all.into_iter().chain(generic.as_mut().map(|generic| ("generic", generic)))
    }

    fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let Self { a, gate, up, generic } = self;
        let all = [("A", a), ("gate.B", gate), ("up.B", up)];
        all.into_iter().chain(generic.as_ref().map(|generic| ("generic", generic)))
    }
}

fn name(layer: usize, half: &str) -> String {
    format!("model.layers.{layer}.mlp.dictionary.{half}")
}

impl DictionaryAdapter {
    /// The name that its file has by default, beside a dictionary or a model.
    pub const FILE: &str = "dictionary_adapter.safetensors";

    /// One that reads nothing yet, for vectors that are made as `config` says: as in an
    /// [`Adapter`](crate::Adapter), `A` is uniform in `±1 / sqrt(hidden)` and `B` zero. The same seed gives the same
    /// adapter.
    ///
    /// # Errors
    /// As [`DictionaryConfig::validate`]; [`Error::Parameter`] for layers that the model does not have, and for a rank
    /// of 0 or more than `hidden`; [`Error::Unsupported`] for a mixture of experts.
    pub fn new(
        model: &Config,
        config: &DictionaryConfig,
        rank: usize,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        config.check(model)?;
        let (hidden, intermediate) = (model.hidden_size, model.intermediate_size);
        if !(1..=hidden).contains(&rank) {
            return Err(Error::parameter("rank", format!("1 to {hidden}"), rank));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let reach = 1.0 / (hidden as f32).sqrt();
        let mut columns = BTreeMap::new();
        for layer in config.chosen_layers() {
            let values = (0..rank * hidden).map(|_| rng.random_range(-reach..=reach)).collect();
            let a = Tensor::from_vec::<_, f32>(values, (rank, hidden), device)?;
            let zeros =
                || Tensor::from_vec(vec![0f32; intermediate * rank], (intermediate, rank), device);
            columns.insert(*layer, Columns { a, gate: zeros()?, up: zeros()?, generic: None });
        }
        Ok(Self { config: config.clone(), columns })
    }

    /// The same with a vector, `(hidden)`, that rows of no entry have in one of its layers: such as what is generic in
    /// contexts, or zeros that are to be trained. Default: none, which is zero and not trained; rows of no entry are then
    /// what they were.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a layer that it does not read, or anything but such a vector of finite numbers.
    pub fn with_generic(mut self, layer: usize, generic: &Tensor) -> Result<Self> {
        let Some(columns) = self.columns.get_mut(&layer) else {
            let expected = format!("one of the layers {:?}", self.config.chosen_layers());
            return Err(Error::parameter("layer", expected, layer));
        };
        let hidden = columns.a.dim(1)?;
        if generic.dims() != [hidden] {
            let got = format!("{:?}", generic.dims());
            return Err(Error::parameter("generic", format!("a vector ({hidden})"), got));
        }
        let generic = generic.to_dtype(candle_core::DType::F32)?;
        if let Some(value) = generic.to_vec1::<f32>()?.into_iter().find(|value| !value.is_finite())
        {
            return Err(Error::parameter("generic", "finite numbers", value));
        }
        columns.generic = Some(generic);
        Ok(self)
    }

    /// How the vectors are made that it reads.
    #[must_use]
    pub fn config(&self) -> &DictionaryConfig {
        &self.config
    }

    /// Its tensors, by the names that they have in a file.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.columns.iter().flat_map(|(layer, columns)| {
            columns.tensors().map(|(half, tensor)| (name(*layer, half), tensor))
        })
    }

    /// A copy whose tensors are [`variables`](Self::variables): a model made with it, whose stream is `f32`, sees an
    /// optimiser's changes to them, and provides their gradients. One of another type has a copy of its own.
    ///
    /// # Errors
    /// When a device has no room.
    pub fn trainable(&self) -> Result<Self> {
        let mut copy = self.clone();
        for (_, tensor) in copy.columns.values_mut().flat_map(Columns::tensors_mut) {
            *tensor = Var::from_tensor(&tensor.detach().copy()?)?.into_inner();
        }
        Ok(copy)
    }

    /// What an optimiser must change, in the order of [`tensors`](Self::tensors). Empty unless it is
    /// [`trainable`](Self::trainable).
    ///
    /// # Errors
    /// When a device fails.
    pub fn variables(&self) -> Result<Vec<Var>> {
        let tensors = self.tensors().map(|(_, tensor)| tensor);
        tensors.filter(|it| it.is_variable()).map(|it| Ok(Var::from_tensor(it)?)).collect()
    }

    /// Writes it as one safetensors file, replaced atomically; it may lie in the folder of an
    /// [`Adapter`](crate::Adapter), beside that.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let tensors = self.tensors().map(|(name, tensor)| Ok((name, Values::of(tensor)?)));
        let about = serde_json::to_string(&self.config).map_err(|it| Error::malformed(path, it))?;
        let about = HashMap::from([(ABOUT.to_string(), about)]);
        replace(path, &serialize(tensors.collect::<Result<Vec<_>>>()?, about, path)?)
    }

    /// Reads what [`save`](Self::save) has written. Whether it fits a model is checked when it is used.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] for anything else than such a file; [`Error::MissingWeight`],
    /// [`Error::UnusedWeight`], [`Error::WeightShape`], [`Error::WeightValue`] for its tensors.
    pub fn open(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let file = TensorFile::open(path)?;
        let wrong = |message: String| Error::malformed(path, message);
        let about = file.metadata(ABOUT).ok_or_else(|| wrong(format!("no {ABOUT}")))?;
        let config: DictionaryConfig =
            serde_json::from_str(about).map_err(|error| wrong(format!("{ABOUT}: {error}")))?;
        config.validate().map_err(|error| wrong(error.to_string()))?;
        let shapes: HashMap<&str, &[usize]> = file.tensors().collect();
        let size = |name: &str, axis: usize| {
            shapes.get(name).and_then(|shape| shape.get(axis)).copied().unwrap_or(0)
        };
        let (mut columns, mut known) = (BTreeMap::new(), 0);
        for layer in config.chosen_layers() {
            let of = |half: &str| name(*layer, half);
            let (rank, hidden) = (size(&of("A"), 0), size(&of("A"), 1));
            let read = |half: &str, shape: &[usize]| file.tensor(&of(half), shape, device);
            let inner = [size(&of("gate.B"), 0), rank];
            let generic = match shapes.contains_key(of("generic").as_str()) {
                true => Some(read("generic", &[hidden])?),
                false => None,
            };
            known += 3 + usize::from(generic.is_some());
            let (a, gate) = (read("A", &[rank, hidden])?, read("gate.B", &inner)?);
            columns.insert(*layer, Columns { a, gate, up: read("up.B", &inner)?, generic });
        }
        let adapter = Self { config, columns };
        if shapes.len() != known {
            let names: Vec<String> = adapter.tensors().map(|(name, _)| name).collect();
            let unused = shapes.keys().find(|name| !names.iter().any(|it| it == *name));
            let name = unused.map(|name| (*name).to_string()).unwrap_or_default();
            let (place, reason) = (
                path.display().to_string(),
                "no part of an adapter that reads a dictionary".into(),
            );
            return Err(Error::UnusedWeight { name, place, reason });
        }
        Ok(adapter)
    }

    pub(super) fn columns(&self) -> &BTreeMap<usize, Columns> {
        &self.columns
    }
}
