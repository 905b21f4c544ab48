//! Quantised weights: how `quantization_config` says that they are stored, and the tensors a linear layer has then.

use serde_json::Value;

use super::config::Fields;
use crate::Result;

/// How the linear layers' weights are stored.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Quantization {
    /// The format.
    pub format: QuantFormat,
    /// Modules that are stored in the model's own type: parts of their names.
    pub skipped: Vec<String>,
}

/// The formats that the rules can cut. With a weight `[out, in]`:
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantFormat {
    /// GPTQ: `qweight [in / pack, out]` in 32-bit words that pack `32 / bits` inputs, `scales [in / group, out]`,
    /// `qzeros [in / group, out / pack]`, `g_idx [in]`.
    Gptq {
        /// Bits a weight: 2, 4 or 8.
        bits: usize,
        /// Inputs that share a scale; 0 for all of them.
        group: usize,
        /// Whether `g_idx` orders the inputs by activation: groups are then scattered over all inputs, and a rank
        /// with some inputs needs every group's scale.
        scattered: bool,
    },
    /// AWQ: `qweight [in, out / pack]`, `qzeros [in / group, out / pack]`, `scales [in / group, out]`.
    Awq {
        /// Bits a weight: 4.
        bits: usize,
        /// Inputs that share a scale.
        group: usize,
    },
    /// FP8 with a scale a block: `weight [out, in]`, `weight_scale_inv [out / rows, in / columns]`.
    Fp8Blocks {
        /// Outputs a block.
        rows: usize,
        /// Inputs a block.
        columns: usize,
    },
    /// FP8 with one scale a tensor: `weight [out, in]`, `weight_scale []`, `input_scale []` where activations'
    /// scales are fixed.
    Fp8Tensor {
        /// Whether there is an `input_scale`.
        fixed_input: bool,
    },
    /// MXFP4 (of stacked experts): `blocks [.., in / 32, 16]` of two weights a byte, `scales [.., in / 32]`.
    Mxfp4,
}

impl QuantFormat {
    /// Its `quant_method`.
    pub const fn name(self) -> &'static str {
        match self {
            QuantFormat::Gptq { .. } => "gptq",
            QuantFormat::Awq { .. } => "awq",
            QuantFormat::Fp8Blocks { .. } | QuantFormat::Fp8Tensor { .. } => "fp8",
            QuantFormat::Mxfp4 => "mxfp4",
        }
    }
}

impl Quantization {
    /// Whether a module's weights are stored as the others'.
    pub fn covers(&self, module: &str) -> bool {
        !self.skipped.iter().any(|part| module.contains(part.as_str()))
    }
}

/// Reads `quantization_config`.
pub(super) fn quantization(f: &Fields) -> Result<Option<Quantization>> {
    let Some(q) = f.object("quantization_config")? else { return Ok(None) };
    const LARGEST: usize = 1 << 20;
    let method = q.text("quant_method")?.ok_or_else(|| q.error("quant_method", "is missing"))?;
    let bits = |of: &[usize]| -> Result<usize> {
        let field = if q.get("bits").is_none() && q.get("w_bit").is_some() { "w_bit" } else { "bits" };
        let bits = q.required(field, 32)?;
        if !of.contains(&bits) {
            return Err(
                q.error(field, format!("= {bits} can't be cut: a 32-bit word must hold whole weights"))
            );
        }
        Ok(bits)
    };
    // -1 is one group of all inputs.
    let group = || -> Result<usize> {
        let field = if q.get("group_size").is_none() && q.get("q_group_size").is_some() {
            "q_group_size"
        } else {
            "group_size"
        };
        match q.get(field) {
            Some(value) if value.as_i64() == Some(-1) => Ok(0),
            _ => q.required(field, LARGEST),
        }
    };
    let format = match method {
        "gptq" => QuantFormat::Gptq {
            bits: bits(&[2, 4, 8])?,
            group: group()?,
            scattered: q.flag("desc_act")?.unwrap_or(false),
        },
        "awq" => match q.text("version")?.unwrap_or("gemm").to_ascii_lowercase().as_str() {
            "gemm" => QuantFormat::Awq { bits: bits(&[4])?, group: group()? },
            other => {
                return Err(
                    q.error("version", format!("= \"{other}\" is not supported: use the gemm layout"))
                );
            }
        },
        "fp8" => match q.get("weight_block_size") {
            Some(value) => {
                let (rows, columns) = block(&q, value, LARGEST)?;
                QuantFormat::Fp8Blocks { rows, columns }
            }
            None => QuantFormat::Fp8Tensor { fixed_input: q.text("activation_scheme")? == Some("static") },
        },
        "mxfp4" => QuantFormat::Mxfp4,
        other => {
            return Err(f.unsupported(format!(
                "quantization_config.quant_method \"{other}\" is not supported, as its layout has no rules here: \
                 use gptq, awq, fp8, mxfp4 or the unquantised weights"
            )));
        }
    };
    let mut skipped = Vec::new();
    for field in ["modules_to_not_convert", "ignored_layers"] {
        if let Some(value) = q.get(field) {
            let names =
                value.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
            let names = names.ok_or_else(|| q.wrong(field, "a list of names", value))?;
            skipped.extend(names.into_iter().filter(|n| !n.is_empty()).map(str::to_owned));
        }
    }
    Ok(Some(Quantization { format, skipped }))
}

fn block(q: &Fields, value: &Value, limit: usize) -> Result<(usize, usize)> {
    let side = |i: usize| {
        let n = value.as_array().filter(|a| a.len() == 2).and_then(|a| a[i].as_u64())?;
        usize::try_from(n).ok().filter(|n| (1..=limit).contains(n))
    };
    match (side(0), side(1)) {
        (Some(rows), Some(columns)) => Ok((rows, columns)),
        _ => Err(q.wrong("weight_block_size", "two whole numbers above 0", value)),
    }
}
