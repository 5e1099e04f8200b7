//! `config.json` and `generation_config.json` of a Hugging Face checkpoint, as transformers 4 and 5 and community converters write
//! them.

use serde_json::{Map, Value};

use super::fields::{Fields, unsupported, wrong_type};
use crate::config::{ConfigError, ModelConfig, RewardHead};

impl ModelConfig {
    /// Reads a `config.json`; the EOS ids of a `generation_config.json` are added to its own.
    ///
    /// # Errors
    /// The text is not JSON, a size is missing or impossible, or the model is not a Nemotron that this engine runs.
    pub fn from_hf_json(config: &str, generation_config: Option<&str>) -> Result<Self, ConfigError> {
        let object: Map<String, Value> = serde_json::from_str(config)?;
        let fields = Fields(&object);
        if fields.find(&["model_type"]).is_none() {
            return Err(ConfigError::Missing("model_type"));
        }
        fields.demand("model_type", "nemotron", Value::Null)?;
        fields.demand("hidden_act", "relu2", "relu2")?;
        for key in ["tie_word_embeddings", "attention_bias", "mlp_bias"] {
            fields.demand(key, false, false)?;
        }
        check_quantization(fields)?;

        let hidden_size = fields.required_size(&["hidden_size"])?;
        let num_heads = fields.required_size(&["num_attention_heads"])?;
        let head_dim = match fields.size(&["head_dim", "kv_channels"])? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => return Err(ConfigError::Missing("head_dim")),
        };
        let empty = Map::new();
        let rope = rope_parameters(fields, &empty)?;
        let rotary_names = ["partial_rotary_factor", "rope_percent", "rope_percentage"];
        let rope_number = |names: &[&'static str], default| {
            Ok::<_, ConfigError>(rope.number(names)?.or(fields.number(names)?).unwrap_or(default))
        };
        let rotary_fraction = rope_number(&rotary_names, 0.5)?;
        let rope_theta = rope_number(&["rope_theta"], 10_000.0)?;

        let mut eos_ids = fields.ids("eos_token_id")?;
        if let Some(text) = generation_config {
            let object: Map<String, Value> = serde_json::from_str(text)?;
            if let Some(more) = Fields(&object).ids("eos_token_id")? {
                eos_ids.get_or_insert_default().extend(more);
            }
        }
        // Transformers' own default, for a checkpoint that names no id anywhere.
        let mut eos_ids = eos_ids.unwrap_or_else(|| vec![3]);
        eos_ids.sort_unstable();
        eos_ids.dedup();

        Self {
            num_layers: fields.required_size(&["num_hidden_layers"])?,
            hidden_size,
            num_heads,
            num_kv_heads: fields.size(&["num_key_value_heads"])?.unwrap_or(num_heads),
            head_dim,
            ffn_size: fields.required_size(&["intermediate_size"])?,
            vocab_size: fields.required_size(&["vocab_size"])?,
            max_context: fields.size(&["max_position_embeddings"])?.unwrap_or(4096),
            norm_eps: fields.number(&["norm_eps", "layer_norm_eps"])?.unwrap_or(1e-5) as f32,
            rope_theta,
            rotary_fraction,
            bos_id: bos_id(fields)?,
            eos_ids,
            reward: reward_head(fields)?,
        }
        .validate()
    }
}

/// Weights may be FP8 with a scale a tensor or row: those of AutoFP8, compressed-tensors and ModelOpt.
fn check_quantization(fields: Fields<'_>) -> Result<(), ConfigError> {
    let Some((key, value)) = fields.find(&["quantization_config"]) else { return Ok(()) };
    let fields = Fields(value.as_object().ok_or_else(|| wrong_type(key, value, "an object"))?);
    match fields.find(&["quant_method"]).and_then(|(_, method)| method.as_str()) {
        Some("fp8") => fields.demand("weight_block_size", Value::Null, Value::Null),
        Some("modelopt") => fields.demand("quant_algo", "FP8", "FP8"),
        Some("compressed-tensors") => {
            fields.demand("format", "float-quantized", "float-quantized")?;
            let groups = fields.find(&["config_groups"]).and_then(|(_, groups)| groups.as_object());
            for group in groups.into_iter().flat_map(Map::values) {
                let Some(weights) = group.get("weights").and_then(Value::as_object) else { continue };
                let weights = Fields(weights);
                weights.demand("num_bits", 8, 8)?;
                weights.demand("type", "float", "float")?;
                if weights.find(&["strategy"]).is_none_or(|(_, strategy)| strategy != "channel") {
                    weights.demand("strategy", "tensor", "tensor")?;
                }
            }
            Ok(())
        }
        _ => Err(unsupported("quantization_config", value, &"fp8, compressed-tensors or modelopt".into())),
    }
}

/// Transformers' `NemotronForSequenceClassification`: one label an attribute. It has no bias; a conversion of ours says with `score_bias`
/// that it wrote one.
fn reward_head(fields: Fields<'_>) -> Result<Option<RewardHead>, ConfigError> {
    let architectures = fields.0.get("architectures").and_then(Value::as_array);
    if architectures.and_then(|names| names.first()).is_none_or(|name| name != "NemotronForSequenceClassification") {
        return Ok(None);
    }
    let labels = fields.0.get("id2label").and_then(Value::as_object).map(Map::len);
    let num_attributes = labels.or(fields.size(&["num_labels"])?).unwrap_or(2);
    Ok(Some(RewardHead { num_attributes, has_bias: fields.0.get("score_bias") == Some(&Value::Bool(true)) }))
}

/// An absent key means transformers' default, an explicit null means that there is none.
fn bos_id(fields: Fields<'_>) -> Result<Option<u32>, ConfigError> {
    match fields.0.get("bos_token_id") {
        None => Ok(Some(2)),
        Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(wrong_type("bos_token_id", value, "a token id")),
        },
    }
}

/// The nested object of transformers 5, or `empty`. Any kind of context extension changes the angles, so only the default will do.
fn rope_parameters<'a>(fields: Fields<'a>, empty: &'a Map<String, Value>) -> Result<Fields<'a>, ConfigError> {
    let mut nested = empty;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some((_, value)) = fields.find(&[key]) else { continue };
        let object = value.as_object().ok_or_else(|| wrong_type(key, value, "an object"))?;
        let kind = Fields(object).find(&["rope_type", "type"]).map(|(_, kind)| kind);
        if kind.is_some_and(|kind| kind != "default") || (kind.is_none() && key == "rope_scaling") {
            return Err(unsupported(key, kind.unwrap_or(value), &"default".into()));
        }
        nested = object;
    }
    Ok(Fields(nested))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Reads a small valid configuration with the given keys replaced or, by null, made absent.
    fn read(changes: &Value) -> Result<ModelConfig, String> {
        let mut config = json!({
            "model_type": "nemotron", "hidden_act": "relu2", "hidden_size": 128, "intermediate_size": 512,
            "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1024,
        });
        for (key, value) in changes.as_object().expect("a test gives an object") {
            config[key] = value.clone();
        }
        ModelConfig::from_hf_json(&config.to_string(), None).map_err(|error| error.to_string())
    }

    fn minimal() -> ModelConfig {
        ModelConfig {
            num_layers: 4,
            hidden_size: 128,
            num_heads: 8,
            num_kv_heads: 8,
            head_dim: 16,
            ffn_size: 512,
            vocab_size: 1024,
            max_context: 4096,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rotary_fraction: 0.5,
            bos_id: Some(2),
            eos_ids: vec![3],
            reward: None,
        }
    }

    #[test]
    fn absent_keys_have_the_defaults_of_transformers() {
        assert_eq!(read(&json!({})), Ok(minimal()));
        assert_eq!(
            read(&json!({ "num_key_value_heads": null, "head_dim": null, "rope_scaling": null })),
            Ok(minimal())
        );
    }

    #[test]
    fn every_spelling_of_a_key_is_read() {
        let check = |changes: Value, expected: ModelConfig| assert_eq!(read(&changes), Ok(expected), "{changes}");
        check(json!({ "num_key_value_heads": 2 }), ModelConfig { num_kv_heads: 2, ..minimal() });
        for key in ["head_dim", "kv_channels"] {
            check(json!({ (key): 32 }), ModelConfig { head_dim: 32, ..minimal() });
        }
        for key in ["norm_eps", "layer_norm_eps"] {
            check(json!({ (key): 1e-6 }), ModelConfig { norm_eps: 1e-6, ..minimal() });
        }
        for key in ["partial_rotary_factor", "rope_percent", "rope_percentage"] {
            check(json!({ (key): 1.0 }), ModelConfig { rotary_fraction: 1.0, ..minimal() });
        }
        check(json!({ "rope_theta": 500_000 }), ModelConfig { rope_theta: 500_000.0, ..minimal() });
        // Where both forms are there, transformers 5 uses the nested one.
        check(
            json!({
                "rope_theta": 1.0, "partial_rotary_factor": 1.0,
                "rope_parameters": { "rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25 },
            }),
            ModelConfig { rope_theta: 5e5, rotary_fraction: 0.25, ..minimal() },
        );
        check(
            json!({ "rope_scaling": { "type": "default" }, "rope_theta": 5e5 }),
            ModelConfig { rope_theta: 5e5, ..minimal() },
        );
        check(json!({ "bos_token_id": null }), ModelConfig { bos_id: None, ..minimal() });
        check(json!({ "eos_token_id": [5, 3] }), ModelConfig { eos_ids: vec![3, 5], ..minimal() });
    }

    #[test]
    fn eos_ids_of_both_files_count() {
        let eos_ids = |config: Value, generation_config: Value| {
            let config = json!({
                "model_type": "nemotron", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
                "num_attention_heads": 8, "vocab_size": 1024, "eos_token_id": config,
            });
            let generation_config = json!({ "eos_token_id": generation_config }).to_string();
            ModelConfig::from_hf_json(&config.to_string(), Some(&generation_config)).map(|config| config.eos_ids)
        };
        assert_eq!(eos_ids(json!(3), json!([3, 5])).ok(), Some(vec![3, 5]));
        assert_eq!(eos_ids(json!([3, 5]), json!(7)).ok(), Some(vec![3, 5, 7]));
        assert_eq!(eos_ids(json!(null), json!(5)).ok(), Some(vec![5]));
        assert_eq!(eos_ids(json!(null), json!(null)).ok(), Some(vec![3]));
        assert!(eos_ids(json!(3), json!("x")).is_err());
    }

    #[test]
    fn another_architecture_is_refused_with_key_and_value() {
        let check = |changes: Value, expected: &str| {
            let expected = format!("checkpoint is for another architecture: {expected}");
            assert_eq!(read(&changes), Err(expected));
        };
        check(json!({ "model_type": "llama" }), "model_type is llama, this engine runs nemotron");
        check(json!({ "hidden_act": "silu" }), "hidden_act is silu, this engine runs relu2");
        check(json!({ "tie_word_embeddings": true }), "tie_word_embeddings is true, this engine runs false");
        check(json!({ "attention_bias": true }), "attention_bias is true, this engine runs false");
        check(json!({ "mlp_bias": true }), "mlp_bias is true, this engine runs false");
        check(
            json!({ "rope_scaling": { "type": "linear", "factor": 2 } }),
            "rope_scaling is linear, this engine runs default",
        );
        check(
            json!({ "rope_parameters": { "rope_type": "yarn" } }),
            "rope_parameters is yarn, this engine runs default",
        );
        check(
            json!({ "quantization_config": { "quant_method": "gptq" } }),
            r#"quantization_config is {"quant_method":"gptq"}, this engine runs fp8, compressed-tensors or modelopt"#,
        );
    }

    #[test]
    fn damaged_values_are_refused_with_their_key() {
        let check = |changes: Value, expected: &str| assert_eq!(read(&changes), Err(expected.to_owned()));
        check(json!({ "model_type": null }), "key model_type is missing");
        check(json!({ "vocab_size": null }), "key vocab_size is missing");
        check(json!({ "num_hidden_layers": 0 }), "num_hidden_layers is 0, which is not a size above 0");
        check(json!({ "hidden_size": -1 }), "hidden_size is -1, which is not a size above 0");
        check(json!({ "hidden_size": "128" }), "hidden_size is 128, which is not a size above 0");
        check(json!({ "norm_eps": [] }), "norm_eps is [], which is not a number");
        check(json!({ "num_attention_heads": 7 }), "key head_dim is missing");
        check(json!({ "eos_token_id": -1 }), "eos_token_id is -1, which is not a token id or a list of token ids");
        check(json!({ "bos_token_id": 4_294_967_296_u64 }), "bos_token_id is 4294967296, which is not a token id");
        check(json!({ "rope_parameters": 3 }), "rope_parameters is 3, which is not an object");
        for text in ["", "[]", "{", "null"] {
            assert!(matches!(ModelConfig::from_hf_json(text, None), Err(ConfigError::Json(_))), "{text}");
        }
    }
}
