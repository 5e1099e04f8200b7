//! Checkpoints as people meet them: `inspect`, `convert`, and serving from what was converted.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::support::{finish, nemotron, root};

fn fixture(name: &str) -> String {
    root().join("tests/fixtures").join(name).display().to_string()
}

/// The metadata of Nemotron-4-340B as NVIDIA published it, without a byte of its weights.
fn write_340b_metadata(folder: &Path) {
    const LAYERS: usize = 96;
    const HIDDEN: usize = 18_432;
    const FFN: usize = 73_728;
    const VOCAB: usize = 256_000;
    const TP: usize = 8;
    let weights = folder.join("model_weights");
    fs::create_dir_all(&weights).unwrap();
    let backend = json!({ "sharded_backend": "zarr", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1 });
    fs::write(weights.join("metadata.json"), backend.to_string()).unwrap();
    let layer = "model.decoder.layers.";
    let arrays = [
        ("model.embedding.word_embeddings.weight".to_owned(), vec![VOCAB, HIDDEN], Some(0)),
        (format!("{layer}self_attention.linear_qkv.layer_norm_weight"), vec![LAYERS, HIDDEN], None),
        (format!("{layer}self_attention.linear_qkv.layer_norm_bias"), vec![LAYERS, HIDDEN], None),
        (format!("{layer}self_attention.linear_qkv.weight"), vec![LAYERS, 21_504, HIDDEN], Some(1)),
        (format!("{layer}self_attention.linear_proj.weight"), vec![LAYERS, HIDDEN, HIDDEN], Some(2)),
        (format!("{layer}mlp.linear_fc1.layer_norm_weight"), vec![LAYERS, HIDDEN], None),
        (format!("{layer}mlp.linear_fc1.layer_norm_bias"), vec![LAYERS, HIDDEN], None),
        (format!("{layer}mlp.linear_fc1.weight"), vec![LAYERS, FFN, HIDDEN], Some(1)),
        (format!("{layer}mlp.linear_fc2.weight"), vec![LAYERS, HIDDEN, FFN], Some(2)),
        ("model.decoder.final_layernorm.weight".to_owned(), vec![HIDDEN], None),
        ("model.decoder.final_layernorm.bias".to_owned(), vec![HIDDEN], None),
        ("model.output_layer.weight".to_owned(), vec![VOCAB, HIDDEN], Some(0)),
    ];
    for (name, shape, split) in arrays {
        let mut chunks = shape.clone();
        if name.starts_with(layer) {
            chunks[0] = 1;
        }
        if let Some(axis) = split {
            chunks[axis] /= TP;
        }
        let metadata = json!({ "chunks": chunks, "compressor": null, "dtype": "bfloat16", "fill_value": null, "filters": null, "order": "C", "shape": shape, "zarr_format": 2 });
        fs::create_dir(weights.join(&name)).unwrap();
        fs::write(weights.join(&name).join(".zarray"), metadata.to_string()).unwrap();
    }
    let config = "mcore_gpt: true\nnum_layers: 96\nhidden_size: 18432\nffn_hidden_size: 73728\nnum_attention_heads: 96\nnum_query_groups: 8\n\
        kv_channels: null\nnormalization: layernorm1p\nactivation: squared-relu\nbias: false\nposition_embedding_type: rope\n\
        rotary_percentage: 0.5\nshare_embeddings_and_output_weights: false\nencoder_seq_length: 4096\n";
    fs::write(folder.join("model_config.yaml"), config).unwrap();
}

#[test]
fn the_metadata_of_the_340b_alone_gives_its_parameters_and_the_reading_plan_of_each_rank() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("340b");
    write_340b_metadata(&folder);
    let (code, stdout, stderr) = finish(nemotron(home.path()).args(["inspect", "340b", "--json"]));
    assert_eq!(code, 0, "{stderr}");
    let inspection: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(inspection["parameters"], 341_029_195_776_u64);
    assert_eq!(inspection["has_data"], false);
    let plan = &inspection["reading_plan"];
    assert_eq!((&plan["profile"], &plan["mesh"]), (&json!("h100x16"), &json!({ "tp": 8, "pp": 2 })));
    // Two bytes a parameter, each read once.
    assert_eq!(plan["bytes"], 682_058_391_552_u64);
    let ranks = plan["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 16);
    let bytes: Vec<u64> = ranks.iter().map(|rank| rank["bytes"].as_u64().unwrap()).collect();
    assert_eq!(bytes.iter().sum::<u64>(), 682_058_391_552);
    assert!(bytes.iter().all(|bytes| (42_500_000_000..42_800_000_000).contains(bytes)), "{bytes:?}");
    // Chunks are those of eight ranks: each rank reads whole files.
    assert!(
        ranks[1..8].iter().all(|rank| rank["extents"] == rank["files"] && rank["files"] == 1 + 48 * 4),
        "{ranks:?}"
    );
    let (code, stdout, _) = finish(nemotron(home.path()).args(["inspect", "340b"]));
    assert!(code == 0 && stdout.contains("341029195776") && stdout.contains("reading plan  h100x16: tp 8 × pp 2"));

    // Enough to plan for.
    for profile in ["h100x16", "h200x8"] {
        let (code, stdout, stderr) =
            finish(nemotron(home.path()).args(["plan", "--profile", profile, "--model", "340b", "--json"]));
        assert_eq!(code, 0, "{profile}: {stderr}");
        let plan: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!((&plan["parameters"], &plan["fits"]), (&json!(341_029_195_776_u64), &json!(true)), "{profile}");
    }

    // Weights that are not there are found before anything is started.
    let (code, _, stderr) = finish(nemotron(home.path()).args(["inspect", "340b", "--verify"]));
    assert!(code == 22 && stderr.contains("word_embeddings.weight/0.0"), "{stderr}");
    // A copy that has just begun is no metadata alone.
    fs::write(folder.join("model_weights/model.decoder.final_layernorm.bias/0"), vec![0; 2 * 18_432]).unwrap();
    let (code, _, stderr) = finish(nemotron(home.path()).args(["inspect", "340b"]));
    assert!(code == 22 && stderr.contains("word_embeddings.weight/0.0"), "{stderr}");
}

#[test]
fn shards_are_written_verified_served_and_refused_on_another_mesh() {
    let home = tempfile::tempdir().unwrap();
    let model = fixture("foreign/llama.cpp-bf16.gguf");
    let convert = ["convert", &model, "shards", "--to", "shards", "--tp", "2", "--pp", "2", "--json"];
    let (code, stdout, stderr) = finish(nemotron(home.path()).args(convert));
    assert_eq!(code, 0, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["files"], 6, "four ranks, a description and a tokenizer: {report}");

    let (code, stdout, stderr) = finish(nemotron(home.path()).args(["inspect", "shards", "--verify", "--read"]));
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("all weights are finite, all files are those of the manifest"), "{stdout}");

    fs::write(home.path().join("job.toml"), "schema = 1\n[input]\nprompts = [\"Shall I\"]\n[output]\npath = \"out.jsonl\"\n[sampling]\ntokens_to_generate = 4\n").unwrap();
    let run = |model: &str, mesh: [&str; 2]| {
        let job =
            ["launch", "--profile", "cpu", "--job", "job.toml", "--model", model, "--tp", mesh[0], "--pp", mesh[1]];
        _ = fs::remove_file(home.path().join("out.jsonl"));
        let (code, _, stderr) = finish(nemotron(home.path()).args(job));
        (code, stderr, fs::read_to_string(home.path().join("out.jsonl")).unwrap_or_default())
    };
    let (code, stderr, from_shards) = run("shards", ["2", "2"]);
    assert_eq!(code, 0, "{stderr}");
    let (code, stderr, from_gguf) = run(&model, ["1", "1"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(from_shards, from_gguf);
    let (code, stderr, _) = run("shards", ["1", "1"]);
    assert!(code == 22 && stderr.contains("--to shards --tp 1 --pp 1"), "{code}: {stderr}");

    // A byte that changes on the way is found while loading.
    let file = home.path().join("shards/rank-002.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.len() - 9;
    bytes[at] ^= 4;
    fs::write(&file, bytes).unwrap();
    let (code, stderr, _) = run("shards", ["2", "2"]);
    assert!(code == 22 && stderr.contains("rank-002.safetensors"), "{code}: {stderr}");
}
