//! A model of half a gigabyte that takes no room: its weights are a hole in a file. What it says means nothing, but it loads like any other.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::root;

const HIDDEN: usize = 1024;
const LAYERS: usize = 24;
const FFN: usize = 4096;
/// Of all keys, and of all values.
const KEYS: usize = 256;

/// Makes it in `home`; its path.
pub(crate) fn zero_model(home: &Path) -> String {
    let (small, folder) = (root().join("tests/fixtures/golden/tiny-hf"), home.join("zero"));
    fs::create_dir_all(&folder).expect("a folder");
    _ = fs::copy(small.join("tokenizer.model"), folder.join("tokenizer.model")).expect("copied");
    let config = fs::read(small.join("config.json")).expect("a configuration");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    for (key, value) in [
        ("hidden_size", HIDDEN),
        ("num_hidden_layers", LAYERS),
        ("intermediate_size", FFN),
        ("head_dim", 64),
        ("num_attention_heads", HIDDEN / 64),
        ("num_key_value_heads", KEYS / 64),
    ] {
        config[key] = json!(value);
    }
    let vocab = config["vocab_size"].as_u64().expect("a number") as usize;
    fs::write(folder.join("config.json"), config.to_string()).expect("written");

    let (mut header, mut end) = (Map::new(), 0);
    let mut add = |name: String, shape: &[usize]| {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [begin, end] }));
    };
    for (name, shape) in
        [("embed_tokens.weight", &[vocab, HIDDEN][..]), ("norm.weight", &[HIDDEN]), ("norm.bias", &[HIDDEN])]
    {
        add(format!("model.{name}"), shape);
    }
    add("lm_head.weight".into(), &[vocab, HIDDEN]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm.weight", &[HIDDEN][..]),
            ("input_layernorm.bias", &[HIDDEN]),
            ("post_attention_layernorm.weight", &[HIDDEN]),
            ("post_attention_layernorm.bias", &[HIDDEN]),
            ("self_attn.q_proj.weight", &[HIDDEN, HIDDEN]),
            ("self_attn.k_proj.weight", &[KEYS, HIDDEN]),
            ("self_attn.v_proj.weight", &[KEYS, HIDDEN]),
            ("self_attn.o_proj.weight", &[HIDDEN, HIDDEN]),
            ("mlp.up_proj.weight", &[FFN, HIDDEN]),
            ("mlp.down_proj.weight", &[HIDDEN, FFN]),
        ] {
            add(format!("model.layers.{layer}.{name}"), shape);
        }
    }
    let header = Value::from(header).to_string();
    let mut file = File::create(folder.join("model.safetensors")).expect("a file");
    file.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| file.write_all(header.as_bytes()))
        .expect("written");
    file.set_len((8 + header.len() + end) as u64).expect("room");
    folder.display().to_string()
}
