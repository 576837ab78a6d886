//! `rope_parameters`, or `rope_scaling` as it was called before, of a `config.json`.

use super::fields::Fields;
use super::rope::{QueryScaling, RopeScaling, yarn_magnitude};
use crate::error::{Error, Result};

/// What `Ministral3Config` of `transformers` takes where a file says nothing.
const MINISTRAL3: &str = r#"{
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
    "llama_4_scaling_beta": 0.1}"#;

/// Everything that a `config.json` says about rotation.
#[derive(Debug, Default)]
pub(super) struct RopeParameters {
    pub(super) theta: Option<f64>,
    pub(super) scaling: Option<RopeScaling>,
    pub(super) query_scaling: Option<QueryScaling>,
}

impl RopeParameters {
    /// Reads them from `fields`, of a model of `positions`. `rope_theta` is beside the sizes or, from
    /// `transformers` 5 on, in `rope_parameters`; where both dictionaries are there, `rope_scaling` says how
    /// to scale.
    pub(super) fn read(fields: &Fields, is_ministral3: bool, positions: usize) -> Result<Self> {
        let mut read = Self { theta: fields.number("rope_theta")?, ..Self::default() };
        refuse_partial_rotation(fields)?;
        let names = ["rope_scaling", "rope_parameters"];
        let mut dictionaries = Vec::new();
        for name in names {
            dictionaries.extend(fields.object(name)?.map(|rope| (name, rope)));
        }
        if dictionaries.is_empty() && is_ministral3 {
            let [_, name] = names;
            dictionaries.push((name, Fields::parse(MINISTRAL3, name)?));
        }
        // What `transformers` puts in the place of what a dictionary says.
        let beside = fields.size("original_max_position_embeddings")?;
        for (name, rope) in dictionaries {
            if let Some(layers) = rope.nested().next() {
                let got = format!("per kind of layer: {layers}");
                return Err(Error::unsupported("rope scaling", got));
            }
            refuse_partial_rotation(&rope)?;
            let rope = Dictionary { name, rope, beside, positions };
            if read.scaling.is_none() {
                read.scaling = rope.scaling()?;
            }
            if read.query_scaling.is_none() {
                read.query_scaling = rope.query_scaling(is_ministral3)?;
            }
            read.theta = rope.rope.number("rope_theta")?.or(read.theta);
        }
        Ok(read)
    }
}

struct Dictionary {
    name: &'static str,
    rope: Fields,
    /// `original_max_position_embeddings` beside the dictionary.
    beside: Option<usize>,
    positions: usize,
}

impl Dictionary {
    fn scaling(&self) -> Result<Option<RopeScaling>> {
        let rope = &self.rope;
        // `type` is how transformers spelled it before 4.43
        let kind = match rope.text("rope_type")?.or(rope.text("type")?) {
            None if self.name == "rope_scaling" => {
                return Err(Error::config("rope_scaling.rope_type", "a string", "nothing"));
            }
            None | Some("default") => return Ok(None),
            Some(kind) => kind,
        };
        if self.scales_by_one(kind)? {
            tracing::warn!(kind, "rope scaling by a factor of 1 changes nothing: passed over");
            return Ok(None);
        }
        let original_max_position_embeddings = self.original()?;
        Ok(Some(match kind {
            "linear" => RopeScaling::Linear { factor: self.required("factor")? },
            "dynamic" => RopeScaling::Dynamic {
                factor: self.required("factor")?,
                original_max_position_embeddings: self.positions,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: self.required("factor")?,
                low_freq_factor: self.required("low_freq_factor")?,
                high_freq_factor: self.required("high_freq_factor")?,
                original_max_position_embeddings,
            },
            "yarn" => self.yarn(original_max_position_embeddings)?,
            other => return Err(Error::unsupported("rope scaling", other)),
        }))
    }

    fn yarn(&self, original_max_position_embeddings: usize) -> Result<RopeScaling> {
        // `transformers` takes 0 for nothing in all of these
        let number = |field| Ok::<_, Error>(self.rope.number(field)?.filter(|value| *value != 0.0));
        let factor = match self.rope.number("factor")? {
            Some(factor) => factor,
            None => self.positions as f64 / original_max_position_embeddings.max(1) as f64,
        };
        let attention_factor = match self.rope.number("attention_factor")? {
            Some(given) => given,
            None => match (number("mscale")?, number("mscale_all_dim")?) {
                (Some(up), Some(down)) => yarn_magnitude(factor, up) / yarn_magnitude(factor, down),
                _ => yarn_magnitude(factor, 1.0),
            },
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast: number("beta_fast")?.unwrap_or(32.0),
            beta_slow: number("beta_slow")?.unwrap_or(1.0),
            truncate: self.rope.flag("truncate")?.unwrap_or(true),
            attention_factor,
        })
    }

    fn query_scaling(&self, is_ministral3: bool) -> Result<Option<QueryScaling>> {
        let Some(beta) = self.rope.number("llama_4_scaling_beta")? else { return Ok(None) };
        if !is_ministral3 {
            tracing::warn!(
                beta,
                "only ministral3 scales its queries: llama_4_scaling_beta is ignored"
            );
            return Ok(None);
        }
        let original_max_position_embeddings = self.original()?;
        Ok(Some(QueryScaling { beta, original_max_position_embeddings }))
    }

    fn original(&self) -> Result<usize> {
        let inside = self.rope.size("original_max_position_embeddings")?;
        Ok(self.beside.or(inside).unwrap_or(self.positions))
    }

    fn required(&self, field: &str) -> Result<f64> {
        let missing = || Error::config(format!("{}.{field}", self.name), "a number", "nothing");
        self.rope.number(field)?.ok_or_else(missing)
    }

    /// Whether RoPE scaling of this kind leaves every angle as it is.
    fn scales_by_one(&self, kind: &str) -> Result<bool> {
        let factor = self.rope.number("factor")? == Some(1.0);
        Ok(match kind {
            "linear" | "dynamic" | "llama3" => factor,
            "yarn" => factor && self.rope.get("attention_factor").is_none(),
            _ => false,
        })
    }
}

fn refuse_partial_rotation(fields: &Fields) -> Result<()> {
    match fields.number("partial_rotary_factor")? {
        None | Some(1.0) => Ok(()),
        Some(factor) => Err(Error::unsupported("partial_rotary_factor", factor)),
    }
}
