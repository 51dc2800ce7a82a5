//! The dialects that packed blocks are written in: tensors, and the section of the configuration.

use awqua::checkpoint::Dtype;
use awqua::quant::{AffineMatrix, awq, compressed, gptq};
use awqua::tensor::Weight;
use awqua::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::grid::Grid;
use crate::write::TensorSpec;

/// On-disk dialect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// AutoAWQ `gemm`: 4 bits, one group size.
    AwqGemm,
    /// compressed-tensors `pack-quantized`.
    PackQuantized,
    /// GPTQModel's `gptq_v2`.
    GptqV2,
}

impl Format {
    /// Whether it has codes of so many bits.
    pub fn holds(self, bits: u32) -> bool {
        match self {
            Self::AwqGemm => bits == 4,
            Self::PackQuantized => matches!(bits, 2..=6 | 8),
            Self::GptqV2 => matches!(bits, 2..=4 | 8),
        }
    }

    /// Checks that this dialect can hold a matrix of (n, k) on this grid.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    pub fn check(self, (n, k): (usize, usize), grid: Grid) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, message));
        match self {
            Self::AwqGemm if !self.holds(grid.bits) => refuse(format!("awq gemm has 4 bits, found {}", grid.bits)),
            Self::GptqV2 if !self.holds(grid.bits) => {
                refuse(format!("gptq has 2, 3, 4 or 8 bits, found {}", grid.bits))
            }
            Self::AwqGemm if n % 8 != 0 => refuse(format!("awq gemm packs outputs in multiples of 8, found {n}")),
            Self::GptqV2 if n % 32 != 0 || k % 32 != 0 => {
                refuse(format!("gptq packs features in multiples of 32, found {n} x {k}"))
            }
            _ => Ok(()),
        }
    }

    /// Element types and shapes of the tensors of a packed module.
    pub(super) fn specs(self, name: &str, (n, k): (usize, usize), grid: Grid) -> Vec<TensorSpec> {
        let groups = k / grid.group(k);
        let words = |count: usize| (count * grid.bits as usize).div_ceil(32);
        let spec = |suffix: &str, dtype: Dtype, shape: &[usize]| TensorSpec {
            name: format!("{name}.{suffix}"),
            dtype,
            shape: shape.to_vec(),
        };
        match self {
            Self::AwqGemm => vec![
                spec("qweight", Dtype::I32, &[k, n / 8]),
                spec("qzeros", Dtype::I32, &[groups, n / 8]),
                spec("scales", Dtype::F16, &[groups, n]),
            ],
            Self::PackQuantized => {
                let mut specs = vec![
                    spec("weight_packed", Dtype::I32, &[n, words(k)]),
                    spec("weight_scale", Dtype::F16, &[n, groups]),
                    spec("weight_shape", Dtype::I64, &[2]),
                ];
                if !grid.symmetric {
                    specs.push(spec("weight_zero_point", Dtype::I32, &[words(n), groups]));
                }
                specs
            }
            Self::GptqV2 => vec![
                spec("g_idx", Dtype::I32, &[k]),
                spec("qweight", Dtype::I32, &[words(k), n]),
                spec("qzeros", Dtype::I32, &[groups, words(n)]),
                spec("scales", Dtype::F16, &[groups, n]),
            ],
        }
    }

    /// The data of every tensor of a packed module, by the suffixes of [`Format::specs`].
    pub(super) fn encode(self, matrix: &AffineMatrix, symmetric: bool) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let halves = |halves: &[half::f16]| halves.iter().flat_map(|half| half.to_le_bytes()).collect();
        Ok(match self {
            Self::AwqGemm => {
                let Weight::W4(canonical) = matrix.to_weight()? else {
                    return Err(Error::new(ErrorKind::Unsupported, "awq gemm has 4 bits"));
                };
                let tensors = awq::encode_gemm(&canonical)?;
                vec![
                    ("qweight", words(&tensors.qweight)),
                    ("qzeros", words(&tensors.qzeros)),
                    ("scales", halves(&tensors.scales)),
                ]
            }
            Self::PackQuantized => {
                let tensors = compressed::encode(matrix, symmetric)?;
                let shape = tensors.weight_shape.iter().flat_map(|v| v.to_le_bytes()).collect();
                let mut all = vec![
                    ("weight_packed", words(&tensors.weight_packed)),
                    ("weight_scale", halves(&tensors.weight_scale)),
                    ("weight_shape", shape),
                ];
                all.extend(tensors.weight_zero_point.map(|zeros| ("weight_zero_point", words(&zeros))));
                all
            }
            Self::GptqV2 => {
                let tensors = gptq::encode(matrix)?;
                vec![
                    ("g_idx", words(&tensors.g_idx)),
                    ("qweight", words(&tensors.qweight)),
                    ("qzeros", words(&tensors.qzeros)),
                    ("scales", halves(&tensors.scales)),
                ]
            }
        })
    }

    /// The `quantization_config` of a checkpoint whose modules have these grids; `dense` are linears of decoder layers
    /// that are not packed. `record` is what Awqua notes about the run.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the dialect cannot say it.
    pub(super) fn section(self, modules: &[(String, Grid)], dense: &[String], record: &Value) -> Result<Value> {
        let grids = grids(modules);
        let refuse = |message: &str| Err(Error::new(ErrorKind::Unsupported, message));
        let Some(&common) = grids.first() else { return refuse("no module is packed") };
        let size = |grid: Grid| grid.group_size.map_or(json!(-1), |size| json!(size));
        match self {
            Self::AwqGemm if grids.len() > 1 => refuse("awq gemm has one grid for all modules"),
            Self::AwqGemm => {
                // Readers exclude by substring.
                for name in dense {
                    if let Some((hit, _)) = modules.iter().find(|(module, _)| module.contains(name.as_str())) {
                        let message = format!("cannot be listed as dense without excluding `{hit}` too");
                        return Err(Error::new(ErrorKind::Unsupported, message).in_tensor(name));
                    }
                }
                Ok(json!({
                    "quant_method": "awq",
                    "bits": 4,
                    "group_size": size(common),
                    "zero_point": true,
                    "version": "gemm",
                    "modules_to_not_convert": if dense.is_empty() { Value::Null } else { json!(dense) },
                    "awqua": record,
                }))
            }
            Self::PackQuantized => {
                let mut groups = Map::new();
                for (i, &grid) in grids.iter().enumerate() {
                    let targets = match grids.len() {
                        1 => json!(["Linear"]),
                        _ => json!(modules.iter().filter(|m| m.1 == grid).map(|m| &m.0).collect::<Vec<_>>()),
                    };
                    groups.insert(
                        format!("group_{i}"),
                        json!({
                            "targets": targets,
                            "input_activations": null,
                            "output_activations": null,
                            "format": "pack-quantized",
                            "weights": {
                                "num_bits": grid.bits,
                                "type": "int",
                                "symmetric": grid.symmetric,
                                "strategy": if grid.group_size.is_some() { "group" } else { "channel" },
                                "group_size": grid.group_size,
                                "actorder": null,
                                "block_structure": null,
                                "dynamic": false,
                                "observer": "minmax",
                                "observer_kwargs": {},
                            },
                        }),
                    );
                }
                let ignore: Vec<&str> = ["lm_head"].into_iter().chain(dense.iter().map(String::as_str)).collect();
                Ok(json!({
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "quantization_status": "compressed",
                    "global_compression_ratio": null,
                    "kv_cache_scheme": null,
                    "ignore": ignore,
                    "config_groups": groups,
                    "awqua": record,
                }))
            }
            Self::GptqV2 => {
                let mut dynamic = Map::new();
                for (name, grid) in modules.iter().filter(|m| m.1 != common) {
                    let rule = json!({ "bits": grid.bits, "group_size": size(*grid), "sym": grid.symmetric });
                    dynamic.insert(format!("+:^{}$", name.replace('.', "\\.")), rule);
                }
                for name in dense {
                    dynamic.insert(format!("-:^{}$", name.replace('.', "\\.")), json!({}));
                }
                Ok(json!({
                    "quant_method": "gptq",
                    "checkpoint_format": "gptq_v2",
                    "bits": common.bits,
                    "group_size": size(common),
                    "desc_act": false,
                    "sym": common.symmetric,
                    "lm_head": false,
                    "pack_dtype": "int32",
                    "true_sequential": true,
                    "static_groups": true,
                    "dynamic": if dynamic.is_empty() { Value::Null } else { Value::Object(dynamic) },
                    "meta": { "quantizer": [format!("awqua:{}", env!("CARGO_PKG_VERSION"))], "awqua": record },
                }))
            }
        }
    }
}

/// The different grids, the most frequent first.
fn grids(modules: &[(String, Grid)]) -> Vec<Grid> {
    let mut found: Vec<(usize, Grid)> = Vec::new();
    for &(_, grid) in modules {
        match found.iter_mut().find(|(_, known)| *known == grid) {
            Some((count, _)) => *count += 1,
            None => found.push((1, grid)),
        }
    }
    found.sort_by_key(|&(count, grid)| (std::cmp::Reverse(count), grid.bits));
    found.into_iter().map(|(_, grid)| grid).collect()
}
