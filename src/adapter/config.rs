//! `adapter_config.json`: which projections are adapted, with what rank and scale.

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::{Map, Value, json};

use super::modules::{Names, Patterns};
use crate::config::{Fields, brief};
use crate::error::{Error, Result};

/// Fields that do not change what a trained adapter computes: any value is accepted. The tensors
/// themselves show which modules are left out, and what training was initialised with.
const ANYTHING: [&str; 15] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Fields that are read.
const READ: [&str; 12] = [
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
    "fan_in_fan_out",
];

/// What `adapter_config.json` says: which projections have an adapter, of what rank, and how much of
/// it is added. The names are PEFT's.
///
/// A file may come from anybody, so what it can make this crate do is limited. Each of `target_modules`,
/// `exclude_modules`, `rank_pattern` and `alpha_pattern` has at most 10,000 entries with a mebibyte of
/// text in all. A regular expression has at most 1024 bytes and is valid by itself; all of a field
/// together compile to at most 4 MiB. Plain names, without characters that mean something in an
/// expression, are compared as they are and count among the entries only. Names of modules are ASCII, and
/// so is what an expression can match.
///
/// ```
/// use hybrid_attention::adapter::AdapterConfig;
///
/// let config = AdapterConfig::rank(16)
///     .alpha(32.0)
///     .target_modules(["q_proj", "v_proj", "down_proj"])
///     .rank_pattern("layers.0.self_attn.q_proj", 4);
/// # config.validate()?;
/// assert_eq!(AdapterConfig::from_json(&config.to_json())?, config);
/// assert_eq!(serde_json::from_str::<AdapterConfig>(&config.to_json()).ok(), Some(config));
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    rank: usize,
    alpha: f64,
    rslora: bool,
    target_modules: Modules,
    exclude_modules: Option<Modules>,
    layers_to_transform: Option<Layers>,
    rank_pattern: Ordered<usize>,
    alpha_pattern: Ordered<f64>,
    /// Everything else in the file, written back as it was.
    rest: Map<String, Value>,
    /// What the names and patterns above mean, once somebody has asked.
    compiled: Compiled,
}

/// Made when it is first asked for, and the same for all clones. It says nothing that the patterns do not
/// say, so all are equal.
#[derive(Clone, Debug, Default)]
struct Compiled(OnceLock<Arc<Matchers>>);

impl PartialEq for Compiled {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// What the names and patterns of a configuration match.
#[derive(Debug)]
struct Matchers {
    targets: Names,
    excluded: Option<Names>,
    ranks: Patterns<usize>,
    alphas: Patterns<f64>,
}

impl Default for AdapterConfig {
    /// As in PEFT for a Mistral: rank 8 and alpha 8 in `q_proj` and `v_proj` of every layer.
    fn default() -> Self {
        let names = ["q_proj", "v_proj"].map(str::to_string);
        let rest = [
            ("base_model_name_or_path", Value::Null),
            ("inference_mode", json!(true)),
            ("init_lora_weights", json!(true)),
            ("lora_dropout", json!(0.0)),
            ("task_type", json!("CAUSAL_LM")),
        ];
        Self {
            rank: 8,
            alpha: 8.0,
            rslora: false,
            target_modules: Modules::Names(names.to_vec()),
            exclude_modules: None,
            layers_to_transform: None,
            rank_pattern: Ordered::default(),
            alpha_pattern: Ordered::default(),
            rest: rest.map(|(field, value)| (field.to_string(), value)).into_iter().collect(),
            compiled: Compiled::default(),
        }
    }
}

/// A set of modules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Modules {
    /// Those whose names end with one of these.
    Names(Vec<String>),
    /// Those whose whole name this regular expression matches. `all-linear` is everything but the head.
    Pattern(String),
}

impl Modules {
    fn names(&self, field: &str) -> Result<Names> {
        match self {
            Self::Names(names) => Names::ending_with(field, names),
            Self::Pattern(pattern) => Names::matching(field, pattern),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Layers {
    One(usize),
    Some(Vec<usize>),
}

impl AdapterConfig {
    /// Adapters of this rank, at least 1. Default 8. `alpha` is set to the same value, so that the scale
    /// is 1.
    #[must_use]
    pub fn rank(rank: usize) -> Self {
        Self { rank, alpha: rank as f64, ..Self::default() }
    }

    /// What is added is scaled by `alpha / rank`: any finite number. Default: the rank.
    #[must_use]
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Whether the scale is `alpha / sqrt(rank)` instead (rsLoRA, Kalajdzievski 2023), which prevents
    /// large ranks from learning more slowly. Default no.
    #[must_use]
    pub fn use_rslora(mut self, rslora: bool) -> Self {
        self.rslora = rslora;
        self
    }

    /// The projections that are adapted, by the ends of their names: `q_proj` matches every layer's,
    /// `layers.3.mlp.up_proj` a single one, `lm_head` the head; of a mixture, `w1` matches that of every
    /// expert, and `block_sparse_moe.gate` the router. Default `q_proj` and `v_proj`.
    #[must_use]
    pub fn target_modules<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.target_modules = Modules::Names(names.into_iter().map(Into::into).collect());
        self.compiled = Compiled::default();
        self
    }

    /// Only these layers, counted from 0. Default: all.
    #[must_use]
    pub fn layers_to_transform(mut self, layers: impl IntoIterator<Item = usize>) -> Self {
        self.layers_to_transform = Some(Layers::Some(layers.into_iter().collect()));
        self
    }

    /// Another rank where the end of a projection's name matches this regular expression. The first
    /// pattern that matches decides.
    #[must_use]
    pub fn rank_pattern(mut self, pattern: impl Into<String>, rank: usize) -> Self {
        self.rank_pattern.0.push((pattern.into(), rank));
        self.compiled = Compiled::default();
        self
    }

    /// Another alpha where the end of a projection's name matches this regular expression. The first
    /// pattern that matches decides.
    #[must_use]
    pub fn alpha_pattern(mut self, pattern: impl Into<String>, alpha: f64) -> Self {
        self.alpha_pattern.0.push((pattern.into(), alpha));
        self.compiled = Compiled::default();
        self
    }

    /// The base model that the adapter was made for, for others to read; it is not used here.
    #[must_use]
    pub fn base_model(mut self, name: impl Into<String>) -> Self {
        self.rest.insert("base_model_name_or_path".into(), Value::String(name.into()));
        self
    }

    /// Reads what PEFT has written.
    ///
    /// # Errors
    /// [`Error::Malformed`] for text that is not a JSON object, [`Error::Config`] for a field of another
    /// type or outside its range, and [`Error::Unsupported`] naming a field that changes the computation
    /// in a way that this crate does not support (DoRA, biases, `modules_to_save`, another `peft_type`),
    /// or that it does not know.
    pub fn from_json(text: &str) -> Result<Self> {
        const FILE: &str = "adapter_config.json";
        let fields = Fields::parse(text, FILE)?;
        match fields.text("peft_type")? {
            Some("LORA") => (),
            Some(other) => return Err(Error::unsupported("adapter field peft_type", other)),
            None => return Err(Error::config("peft_type", "\"LORA\"", "nothing")),
        }
        match fields.text("bias")? {
            None | Some("none") => (),
            Some(other) => return Err(Error::unsupported("adapter field bias", other)),
        }
        if fields.flag("fan_in_fan_out")? == Some(true) {
            return Err(Error::unsupported("adapter field fan_in_fan_out", true));
        }
        // The other initialisations take something away from the base weights.
        let harmless = match fields.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => true,
            Some(Value::String(name)) => ["gaussian", "eva", "orthogonal"].contains(&name.as_str()),
            Some(_) => false,
        };
        let unread = fields.iter().find(|(name, value)| match *name {
            "init_lora_weights" => !harmless,
            name if READ.contains(&name) || ANYTHING.contains(&name) => false,
            _ => !says_nothing(value),
        });
        if let Some((name, value)) = unread {
            return Err(Error::unsupported(format!("adapter field {name}"), brief(value)));
        }
        // `fields` have lost the order of patterns, of which the first match decides.
        #[derive(Deserialize)]
        struct Patterns {
            rank_pattern: Option<Ordered<Value>>,
            alpha_pattern: Option<Ordered<Value>>,
        }
        let patterns: Patterns =
            serde_json::from_str(text).map_err(|error| Error::malformed(FILE, error))?;
        let default = Self::default();
        let config = Self {
            rank: fields.size("r")?.unwrap_or(default.rank),
            alpha: fields.number("lora_alpha")?.unwrap_or(default.alpha),
            rslora: fields.flag("use_rslora")?.unwrap_or(false),
            target_modules: typed(&fields, "target_modules", "a list of names, or a pattern")?
                .unwrap_or(default.target_modules),
            exclude_modules: typed(&fields, "exclude_modules", "a list of names, or a pattern")?,
            layers_to_transform: typed(
                &fields,
                "layers_to_transform",
                "a layer, or a list of them",
            )?,
            rank_pattern: numbers(patterns.rank_pattern, "rank_pattern", |value| {
                value.as_u64()?.try_into().ok()
            })?,
            alpha_pattern: numbers(patterns.alpha_pattern, "alpha_pattern", Value::as_f64)?,
            rest: fields
                .iter()
                .filter(|(name, _)| ANYTHING.contains(name) || *name == "init_lora_weights")
                .map(|(name, value)| (name.to_string(), value.clone()))
                .collect(),
            compiled: Compiled::default(),
        };
        config.validate()?;
        Ok(config)
    }

    /// The content of an `adapter_config.json` that PEFT and [`AdapterConfig::from_json`] read.
    #[must_use]
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct File<'a> {
            #[serde(flatten)]
            rest: Map<String, Value>,
            r: usize,
            lora_alpha: Value,
            use_rslora: bool,
            target_modules: &'a Modules,
            exclude_modules: &'a Option<Modules>,
            layers_to_transform: &'a Option<Layers>,
            rank_pattern: &'a Ordered<usize>,
            alpha_pattern: Ordered<Value>,
        }
        let mut rest = self.rest.clone();
        // Fields of which from_json accepts one value only; other versions of PEFT have other defaults.
        for (field, value) in [
            ("peft_type", json!("LORA")),
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(false)),
            ("modules_to_save", Value::Null),
            ("use_dora", json!(false)),
        ] {
            rest.insert(field.to_string(), value);
        }
        // PEFT writes integers without a decimal point.
        let number = |alpha: f64| match alpha.fract() == 0.0 && alpha.abs() < 1e15 {
            true => json!(alpha as i64),
            false => json!(alpha),
        };
        let alphas = self.alpha_pattern.0.iter();
        let file = File {
            rest,
            r: self.rank,
            lora_alpha: number(self.alpha),
            use_rslora: self.rslora,
            target_modules: &self.target_modules,
            exclude_modules: &self.exclude_modules,
            layers_to_transform: &self.layers_to_transform,
            rank_pattern: &self.rank_pattern,
            alpha_pattern: Ordered(alphas.map(|(it, a)| (it.clone(), number(*a))).collect()),
        };
        // Strings, numbers and lists of them can always be written.
        serde_json::to_string_pretty(&file).unwrap_or_default()
    }

    /// Checks what does not depend on the model.
    ///
    /// # Errors
    /// [`Error::Config`] for a rank of 0 or beyond 2147483647, an alpha that is not finite in `f32`,
    /// no modules at all, or more names and patterns than are read (see above);
    /// [`Error::Unsupported`] for a pattern that is no regular expression here (look-around,
    /// back-references).
    pub fn validate(&self) -> Result<()> {
        let ranks = self.rank_pattern.0.iter().map(|(_, rank)| ("rank_pattern", *rank));
        for (field, rank) in std::iter::once(("r", self.rank)).chain(ranks) {
            if !(1..=i32::MAX as usize).contains(&rank) {
                return Err(Error::config(field, "1 to 2147483647", rank));
            }
        }
        let alphas = self.alpha_pattern.0.iter().map(|(_, alpha)| ("alpha_pattern", *alpha));
        for (field, alpha) in std::iter::once(("lora_alpha", self.alpha)).chain(alphas) {
            if !(alpha as f32).is_finite() {
                return Err(Error::config(field, "a number that is finite in f32", alpha));
            }
        }
        if matches!(&self.target_modules, Modules::Names(names) if names.is_empty()) {
            return Err(Error::config("target_modules", "at least one module", "none"));
        }
        self.rules().map(|_| ())
    }

    /// The same, ready to be queried about modules.
    pub(super) fn rules(&self) -> Result<Rules<'_>> {
        if let Some(matchers) = self.compiled.0.get() {
            return Ok(Rules { config: self, matchers: Arc::clone(matchers) });
        }
        let matchers = Arc::new(Matchers {
            targets: self.target_modules.names("target_modules")?,
            excluded: match &self.exclude_modules {
                Some(modules) => Some(modules.names("exclude_modules")?),
                None => None,
            },
            ranks: Patterns::new("rank_pattern", &self.rank_pattern.0)?,
            alphas: Patterns::new("alpha_pattern", &self.alpha_pattern.0)?,
        });
        let matchers = Arc::clone(self.compiled.0.get_or_init(|| matchers));
        Ok(Rules { config: self, matchers })
    }

    /// The names that were requested, if modules are given by name.
    pub(super) fn target_names(&self) -> &[String] {
        match &self.target_modules {
            Modules::Names(names) => names,
            Modules::Pattern(_) => &[],
        }
    }
}

/// Whether an unknown field is at its default, as far as one can tell.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn typed<T: DeserializeOwned>(fields: &Fields, field: &str, expected: &str) -> Result<Option<T>> {
    let read = |value: &Value| {
        T::deserialize(value).map_err(|_| Error::config(field, expected, brief(value)))
    };
    fields.get(field).map(read).transpose()
}

fn numbers<T>(
    values: Option<Ordered<Value>>,
    field: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Ordered<T>> {
    let each = values.unwrap_or_default().0.into_iter().map(|(pattern, value)| {
        let number = read(&value).ok_or_else(|| {
            Error::config(format!("{field} {pattern}"), "a number", brief(&value))
        })?;
        Ok((pattern, number))
    });
    Ok(Ordered(each.collect::<Result<_>>()?))
}

/// What a configuration says about each module. Modules are queried by the names that they have inside
/// the wrapped model: `model.layers.0.self_attn.q_proj`, or without the first part.
pub(super) struct Rules<'a> {
    config: &'a AdapterConfig,
    matchers: Arc<Matchers>,
}

impl Rules<'_> {
    /// Whether a module has an adapter.
    pub(super) fn targets(&self, module: &str) -> bool {
        if self.matchers.excluded.as_ref().is_some_and(|names| names.contain(module)) {
            return false;
        }
        let among_layers = match &self.config.layers_to_transform {
            Some(Layers::Some(layers)) if layers.is_empty() => true,
            None => true,
            // PEFT looks at the layers only if modules are given by their names.
            Some(_) if matches!(self.config.target_modules, Modules::Pattern(_)) => true,
            Some(layers) => layer_of(module).is_some_and(|layer| match layers {
                Layers::One(one) => layer == *one,
                Layers::Some(some) => some.contains(&layer),
            }),
        };
        among_layers && self.matchers.targets.contain(module)
    }

    pub(super) fn rank(&self, module: &str) -> usize {
        self.matchers.ranks.first(module).unwrap_or(self.config.rank)
    }

    /// What `B A` is multiplied by.
    pub(super) fn scale(&self, module: &str) -> f64 {
        let rank = self.rank(module) as f64;
        let alpha = self.matchers.alphas.first(module).unwrap_or(self.config.alpha);
        if self.config.rslora { alpha / rank.sqrt() } else { alpha / rank }
    }
}

/// The 3 of `model.layers.3.self_attn.q_proj`.
fn layer_of(module: &str) -> Option<usize> {
    module.split('.').find_map(|part| part.parse().ok())
}

/// A JSON object whose order counts.
#[derive(Clone, Debug, PartialEq)]
struct Ordered<T>(Vec<(String, T)>);

impl<T> Default for Ordered<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// As [`AdapterConfig::to_json`] writes it.
impl Serialize for AdapterConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let file: Value = serde_json::from_str(&self.to_json()).map_err(ser::Error::custom)?;
        file.serialize(serializer)
    }
}

/// As [`AdapterConfig::from_json`] reads it.
impl<'de> Deserialize<'de> for AdapterConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let file = Value::deserialize(deserializer)?;
        Self::from_json(&file.to_string()).map_err(de::Error::custom)
    }
}

impl<T: Serialize> Serialize for Ordered<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(pattern, value)| (pattern, value)))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Ordered<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Ordered<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}
