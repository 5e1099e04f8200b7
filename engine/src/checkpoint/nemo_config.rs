//! `model_config.yaml` of a NeMo folder.

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Value};

use super::fields::{Fields, wrong_type};
use crate::config::{ConfigError, ModelConfig, RewardHead};

impl ModelConfig {
    /// Reads a `model_config.yaml`. It does not state the size of the vocabulary, which is that of the embedding, nor any special ids,
    /// which are those of every tokenizer of the family.
    ///
    /// # Errors
    /// The text is not YAML, a size is missing or impossible, or the model is not a Nemotron that this engine runs.
    pub fn from_nemo_yaml(text: &str, vocab_size: usize) -> Result<Self, ConfigError> {
        let scalars = scalars(text)?;
        let fields = Fields(&scalars);
        // The defaults are NeMo's own.
        fields.demand("mcore_gpt", true, false)?;
        fields.demand("normalization", "layernorm1p", "layernorm")?;
        fields.demand("activation", "squared-relu", "gelu")?;
        fields.demand("bias", false, true)?;
        fields.demand("qkv_bias", false, false)?;
        fields.demand("position_embedding_type", "rope", "learned_absolute")?;
        fields.demand("rotary_interleaved", false, false)?;
        fields.demand("seq_len_interpolation_factor", Value::Null, Value::Null)?;
        fields.demand("share_embeddings_and_output_weights", false, true)?;
        fields.demand("apply_embedding_scaling", false, false)?;

        let hidden_size = fields.required_size(&["hidden_size"])?;
        let num_heads = fields.required_size(&["num_attention_heads"])?;
        let head_dim = match fields.size(&["kv_channels"])? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => return Err(ConfigError::Missing("kv_channels")),
        };
        Self {
            num_layers: fields.required_size(&["num_layers"])?,
            hidden_size,
            num_heads,
            num_kv_heads: fields.size(&["num_query_groups"])?.unwrap_or(num_heads),
            head_dim,
            ffn_size: fields.required_size(&["ffn_hidden_size"])?,
            vocab_size,
            max_context: fields.size(&["max_position_embeddings", "encoder_seq_length"])?.unwrap_or(4096),
            norm_eps: fields.number(&["layernorm_epsilon"])?.unwrap_or(1e-5) as f32,
            rope_theta: fields.number(&["rotary_base"])?.unwrap_or(10_000.0),
            rotary_fraction: fields.number(&["rotary_percentage"])?.unwrap_or(1.0),
            bos_id: Some(2),
            eos_ids: vec![3],
            reward: fields
                .size(&["regression.num_attributes"])?
                .map(|num_attributes| RewardHead { num_attributes, has_bias: true }),
        }
        .validate()
    }
}

/// File of the tokenizer as the configuration names it, without the `nemo:` that marks a file of the folder.
pub(super) fn tokenizer_file(text: &str) -> Result<Option<String>, ConfigError> {
    let scalars = scalars(text)?;
    let Some((key, value)) = Fields(&scalars).find(&["tokenizer.model", "tokenizer.tokenizer_model"]) else {
        return Ok(None);
    };
    let name = value.as_str().ok_or_else(|| wrong_type(key, value, "a file name"))?;
    Ok(Some(name.strip_prefix("nemo:").unwrap_or(name).to_owned()))
}

/// Deeper than any configuration; bounds the length of a dotted key.
const MAX_DEPTH: usize = 32;

/// The scalars of a YAML document by their dotted keys (`tokenizer.model`). What stands in a sequence is left out.
fn scalars(text: &str) -> Result<Map<String, Value>, ConfigError> {
    let structure = |problem: &str| Err(ConfigError::Structure(problem.to_owned()));
    let mut scalars = Map::new();
    // One entry for each open mapping: the key that waits for its value.
    let mut keys: Vec<Option<String>> = Vec::new();
    let mut sequences = 0_usize;
    for event in Parser::new_from_str(text) {
        match event?.0 {
            Event::SequenceStart(..) | Event::MappingStart(..) if keys.last() == Some(&None) && sequences == 0 => {
                return structure("a key is not a word");
            }
            Event::SequenceStart(..) => sequences += 1,
            Event::SequenceEnd => {
                sequences -= 1;
                if sequences == 0
                    && let Some(key) = keys.last_mut()
                {
                    *key = None;
                }
            }
            _ if sequences > 0 => {}
            Event::MappingStart(..) if keys.len() == MAX_DEPTH => return structure("nested too deeply"),
            Event::MappingStart(..) => keys.push(None),
            Event::MappingEnd => {
                keys.pop();
                if let Some(key) = keys.last_mut() {
                    *key = None;
                }
            }
            Event::Scalar(text, style, ..) => match keys.last_mut() {
                None => return structure("the document is not a mapping"),
                Some(key @ None) => *key = Some(text.into_owned()),
                Some(Some(_)) => {
                    let dotted = keys.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(".");
                    let value = if style == ScalarStyle::Plain { plain(&text) } else { text.into_owned().into() };
                    if scalars.insert(dotted.clone(), value).is_some() {
                        return structure(&format!("key {dotted} appears twice"));
                    }
                    keys.last_mut().expect("a scalar was read in a mapping").take();
                }
            },
            Event::Alias(_) => return structure("aliases are not supported"),
            _ => {}
        }
    }
    Ok(scalars)
}

/// What an unquoted scalar means.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => true.into(),
        "false" | "False" | "FALSE" => false.into(),
        _ => match text.parse::<u64>() {
            Ok(number) => number.into(),
            Err(_) => match text.parse::<f64>() {
                Ok(number) if number.is_finite() => number.into(),
                _ => text.into(),
            },
        },
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const TINY: &str = include_str!("../../../tests/fixtures/golden/tiny-nemo/model_config.yaml");

    fn read(text: &str) -> Result<ModelConfig, String> {
        ModelConfig::from_nemo_yaml(text, 1024).map_err(|error| error.to_string())
    }

    #[test]
    fn a_written_configuration_is_read() {
        let expected = ModelConfig {
            num_layers: 4,
            hidden_size: 128,
            num_heads: 8,
            num_kv_heads: 2,
            head_dim: 16,
            ffn_size: 512,
            vocab_size: 1024,
            max_context: 256,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rotary_fraction: 0.5,
            bos_id: Some(2),
            eos_ids: vec![3],
            reward: None,
        };
        assert_eq!(read(TINY), Ok(expected.clone()));
        let full_rotary = TINY.replace("rotary_percentage: 0.5\n", "");
        assert_eq!(read(&full_rotary), Ok(ModelConfig { rotary_fraction: 1.0, ..expected.clone() }));
        let mha = TINY
            .replace("num_query_groups: 2", "num_query_groups: null")
            .replace("kv_channels: null", "kv_channels: 32");
        assert_eq!(read(&mha), Ok(ModelConfig { num_kv_heads: 8, head_dim: 32, ..expected }));
    }

    #[test]
    fn the_tokenizer_is_named_under_either_key() {
        let file = |text| tokenizer_file(text).unwrap();
        assert_eq!(file(TINY).as_deref(), Some("d60cadf1a41c651e1f0ade50136bad43_tiny.model"));
        assert_eq!(file("tokenizer: {tokenizer_model: 'nemo:a.model', model: null}").as_deref(), Some("a.model"));
        assert_eq!(
            file("tokenizer:\n  model: /on/another/machine.model\n").as_deref(),
            Some("/on/another/machine.model")
        );
        assert_eq!(file("num_layers: 4"), None);
    }

    #[test]
    fn what_the_engine_does_not_run_is_refused_with_key_and_value() {
        let check = |from: &str, to: &str, expected: &str| {
            assert!(TINY.contains(from), "{from}");
            assert_eq!(read(&TINY.replace(from, to)), Err(expected.to_owned()));
        };
        let other = |what: &str| format!("checkpoint is for another architecture: {what}");
        check(
            "activation: squared-relu",
            "activation: swiglu",
            &other("activation is swiglu, this engine runs squared-relu"),
        );
        check("bias: false\n", "", &other("bias is true, this engine runs false"));
        check("layernorm1p", "rmsnorm", &other("normalization is rmsnorm, this engine runs layernorm1p"));
        check(
            "share_embeddings_and_output_weights: false\n",
            "",
            &other("share_embeddings_and_output_weights is true, this engine runs false"),
        );
        check("hidden_size: 128\n", "hidden_size: ${width}\n", "hidden_size is ${width}, which is not a size above 0");
        check("num_layers: 4\n", "", "key num_layers is missing");
        check("num_layers: 4\n", "num_layers: 4\nnum_layers: 5\n", "not a configuration: key num_layers appears twice");
    }

    #[test]
    fn yaml_that_is_no_configuration_is_refused() {
        let error = |text: &str| read(text).unwrap_err();
        assert_eq!(error("a: &x 1\nb: *x"), "not a configuration: aliases are not supported");
        assert_eq!(error("? [a]\n: b"), "not a configuration: a key is not a word");
        assert_eq!(error("word"), "not a configuration: the document is not a mapping");
        assert_eq!(error("- a\n- b"), error(""));
        assert_eq!(error("a: {b"), "not valid YAML");
        assert_eq!(error(&"{a: ".repeat(33)), "not a configuration: nested too deeply");
        assert!(!error(&format!("a: {}", "[".repeat(100_000))).is_empty());
        assert!(!error(&"- ".repeat(100_000)).is_empty());
    }
}
